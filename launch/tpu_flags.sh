# shellcheck shell=bash
# Flags of the TPU compiler, by generation; sourced by supervise.sh, and so in force however a training was launched. By hand:
#
#   source launch/tpu_flags.sh && jpeglm train ...
#
# libtpu reads LIBTPU_INIT_ARGS once, when JAX first touches the TPU: a list of --xla_tpu_... flags, apart by spaces. They do
# not belong in XLA_FLAGS: the XLA inside jaxlib does not know them and ends the process. What the user has in LIBTPU_INIT_ARGS
# comes last, after what stands here; `echo $LIBTPU_INIT_ARGS` shows the whole.
#
# A flag stands here only with the measurement that it comes from, and the libtpu that it was measured with:
#
#   tpu_flags+=(--xla_tpu_name=value)  # what it does; what it gained on which slice and model; libtpu 0.0.N

# What the machine is, as in v5litepod-64: GKE says it in the environment of its pods, a TPU VM on its metadata server, which
# JAX too asks for what it runs on (jax/_src/clusters/cloud_tpu_cluster.py). Elsewhere, as on a GPU, there are no flags.
tpu_type=${TPU_ACCELERATOR_TYPE:-}
if [ -z "$tpu_type" ] && { [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; }; then
  tpu_type=$(curl --silent --fail --max-time 5 --header "Metadata-Flavor: Google" \
    "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/accelerator-type") || tpu_type=
fi

tpu_flags=()
case "$tpu_type" in
  v4-*) ;;         # none yet
  v5litepod-*) ;;  # none yet
  v5p-*) ;;        # none yet
  v6e-*) ;;        # none yet
esac

if [ "${#tpu_flags[@]}" -gt 0 ]; then
  export LIBTPU_INIT_ARGS="${tpu_flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
fi
