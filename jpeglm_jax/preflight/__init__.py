"""Whether a run fits a slice of TPUs, found out without one."""
