#!/bin/sh
# Starts glmddp under mpirun with what a workstation or container needs; see launch/README.md.
#
#   launch/mpirun.sh [-n RANKS] [mpirun options --] glmddp train --config configs/NAME.toml
#
# RANKS: by default one a GPU (nvidia-smi), or one a core where there is no GPU. Everything else goes to mpirun unchanged.
# SIGINT (Ctrl-C), SIGTERM, SIGUSR1 or SIGHUP: a training saves, stops and says how to go on; a second SIGINT ends it at once.
set -eu

# Words as a shell reads them again.
quote() {
    for word in "$@"; do
        case $word in
        '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s' " "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")" ;;
        *) printf '%s ' "$word" ;;
        esac
    done
}
command=$(quote "$0" "$@")

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0"
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

# What glmddp tells a user to type to go on with a run that was stopped.
default GLMDDP_COMMAND "$command"

# Whether the program is `glmddp train` or `glmddp compare`: what else runs under it does not save.
saves() {
    before=
    for word in "$@"; do
        case $before/$word in
        glmddp/train | glmddp/compare) return 0 ;;
        esac
        before=${word##*/}
    done
    return 1
}
saves "$@" || exec mpirun -n "$num_ranks" "$@"

# On SIGINT, SIGTERM and SIGHUP mpirun kills its processes two seconds later, and no option changes that; SIGUSR1 it passes on. So it runs
# in a session of its own, where Ctrl-C does not reach it, gets SIGUSR1 instead, and ends when this script is killed.
end_with_parent=
if setpriv --pdeathsig TERM true 2>/dev/null; then end_with_parent='setpriv --pdeathsig TERM'; fi
# shellcheck disable=SC2086 # a command and its options
setsid $end_with_parent mpirun -n "$num_ranks" "$@" <&0 &
job=$!

num_interrupts=0
# shellcheck disable=SC2317 # the trap calls it
interrupt() {
    num_interrupts=$((num_interrupts + 1))
    if [ "$num_interrupts" -eq 1 ]; then kill -USR1 "$job"; else kill -TERM "$job"; fi
}
trap interrupt INT
trap 'kill -USR1 "$job"' TERM USR1 HUP

# A signal ends `wait` before the job has ended.
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do
    code=0
    wait "$job" || code=$?
done
if [ "$num_interrupts" -gt 1 ]; then code=130; fi
exit "$code"
