"""How good a model is: likelihood of held-out pictures, references, and a report of a run."""
