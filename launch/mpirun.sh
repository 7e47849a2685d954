#!/bin/sh
# Starts glmddp under mpirun with what a workstation or container needs; see launch/README.md.
#
#   launch/mpirun.sh [-n RANKS] [mpirun options --] glmddp train --config configs/NAME.toml
#
# RANKS: by default one a GPU (nvidia-smi), or one a core where there is no GPU. Everything else goes to mpirun unchanged.
set -eu

usage() {
    sed -n '2,6s/^# \{0,1\}//p' "$0"
}

num_ranks=
case ${1:-} in
-n | -np)
    [ $# -ge 2 ] || { usage >&2; exit 2; }
    num_ranks=$2
    shift 2
    ;;
-h | --help | '')
    usage
    exit 0
    ;;
esac
case $num_ranks in
*[!0-9]* | 0)
    echo "error: number of ranks is \`$num_ranks\`, expected a whole number above 0" >&2
    exit 2
    ;;
esac
if ! command -v mpirun >/dev/null; then
    echo "error: mpirun is not installed" >&2
    echo "hint: apt-get install openmpi-bin libopenmpi-dev" >&2
    exit 2
fi

num_cores=$(nproc)
num_gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
if [ -z "$num_ranks" ]; then
    if [ "$num_gpus" -gt 0 ]; then num_ranks=$num_gpus; else num_ranks=$num_cores; fi
fi

# A name that is set already stays as the user has it. Open MPI 4 reads OMPI_*, Open MPI 5 also PRTE_*.
default() {
    eval "[ -n \"\${$1+set}\" ]" || export "$1=$2"
}

# Root in a container: mpirun refuses it otherwise.
if [ "$(id -u)" -eq 0 ]; then
    for prefix in OMPI PRTE; do
        default "${prefix}_ALLOW_RUN_AS_ROOT" 1
        default "${prefix}_ALLOW_RUN_AS_ROOT_CONFIRM" 1
    done
fi
# Containers forbid process_vm_readv: Open MPI would warn about it on each start.
if [ -f /.dockerenv ] || [ -f /run/.containerenv ] || grep -qsE 'docker|kubepods|containerd' /proc/1/cgroup; then
    default OMPI_MCA_btl_vader_single_copy_mechanism none
fi
# Silent about network cards that are not there.
default OMPI_MCA_btl_base_warn_component_unused 0
# By default mpirun binds a job of one or two ranks to one core each and leaves the rest idle. glmddp divides the cores itself.
default OMPI_MCA_hwloc_base_binding_policy none
default PRTE_MCA_hwloc_default_binding_policy none
# More ranks than cores on this machine: allowed, and waiting ranks give their core away.
if [ "$num_ranks" -gt "$num_cores" ]; then
    default OMPI_MCA_rmaps_base_oversubscribe 1
    default PRTE_MCA_rmaps_default_mapping_policy :oversubscribe
    default OMPI_MCA_mpi_yield_when_idle 1
fi

exec mpirun -n "$num_ranks" "$@"
