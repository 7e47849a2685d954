#!/usr/bin/env bash
# What gpu_check.sh and gpu_bench.sh share; sourced by them. A run is a list of parts. Each part is one process with a time-out of its own, so that
# a kernel that faults or hangs costs its part alone; the report is written again after each part, so that a run that is killed keeps what it had.
#
# The time-outs may add up to more than the budget of the run: a part gets what is left of it, and one that gets nothing is "not run".
# shellcheck disable=SC2034 # `small` is for the scripts that source this
set -euo pipefail

die() {
    printf '\nerror: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '\nhint: %s\n' "$2" >&2
    exit 2
}

# Where CUDA's tools are if nobody said so.
PATH=$PATH:/usr/local/cuda/bin
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
glmddp=$here/bundle/bin/glmddp
mode=all out=. budget='' part_seconds=''
small=()
command_line="$(basename "$0") $*"

# options ARGUMENT...: the options that both scripts have.
options() {
    while [ $# -gt 0 ]; do
        case $1 in
            --quick | --rest) mode=${1#--} ;;
            --small) small=(--small) ;;
            --out | --seconds | --part-seconds)
                [ $# -gt 1 ] || die "$1 without a value"
                case $1 in --out) out=$2 ;; --seconds) budget=$2 ;; *) part_seconds=$2 ;; esac
                shift
                ;;
            *) die "unknown argument $1" "$(basename "$0") [--quick | --rest] [--small] [--out FOLDER] [--seconds N] [--part-seconds N]" ;;
        esac
        shift
    done
    [[ $budget$part_seconds =~ ^[0-9]*$ ]] || die "--seconds $budget, --part-seconds $part_seconds: expected whole numbers"
    # A copy may have lost its modes.
    [ -x "$glmddp" ] || chmod +x "$glmddp" 2>/dev/null || die "$glmddp is not there" "scripts/gpu_pack.sh makes the folder that this is started from"
}

# is MODE: does this run have the parts of MODE (quick or rest)?
is() { [ "$mode" = "$1" ] || [ "$mode" = all ]; }

# begin NAME QUICK REST: a run called NAME (check, bench) with so many seconds for each half, unless --seconds says otherwise.
begin() {
    name=$1
    if [ -z "$budget" ]; then
        case $mode in quick) budget=$2 ;; rest) budget=$3 ;; all) budget=$(($2 + $3)) ;; esac
    fi
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    report=$out/$name-$mode.md
    log=$out/log.txt
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    rows=() not_run=() failed=()
    started=$SECONDS
    libraries
    # Before anything else: a machine without a GPU that works has nothing to say.
    doctor=$("$glmddp" doctor) || die "glmddp doctor fails"
    gpu=$(sed -n 's/^GPU 0  *ok  *\(.*\), compute capability .*/\1/p' <<<"$doctor")
    [ -n "$gpu" ] || die "glmddp doctor finds no GPU that works:
$doctor"
    printf '\n#### %s, %s\n' "$command_line" "$(date -u +'%F %T')" >>"$log"
    write_report running
}

# cuBLAS and its like, where only PyTorch's wheels have them: behind what LD_LIBRARY_PATH names.
libraries() {
    local wheels
    wheels=$(python3 -c '
import nvidia, pathlib
print(":".join(sorted(str(p) for root in nvidia.__path__ for p in pathlib.Path(root).glob("*/lib"))))' 2>/dev/null) || return 0
    [ -z "$wheels" ] || export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$wheels
}

# left: seconds of the budget that are left.
left() { echo $((budget - (SECONDS - started))); }

# outcome PART RESULT SECONDS
outcome() {
    rows+=("| $1 | $2 | $3 |")
    case $2 in
        ok) ;;
        NOT\ RUN*) not_run+=("$1: ${2#NOT RUN: }") ;;
        *) failed+=("$1: $2") ;;
    esac
    write_report running
    printf '%-7s %4s s  %s\n' "${2%%:*}" "$3" "$1${2#"${2%%:*}"}"
}

# skip PART REASON
skip() { outcome "$1" "NOT RUN: $2" 0; }

# part PART LIMIT [--json FILE] COMMAND...: runs COMMAND for at most LIMIT seconds; its output goes to the log as it comes, and the
# telling lines go into the report. With --json FILE stdout goes there, and only stderr to the log.
# Where the function judge_PART's first word is defined, it is given the exit status and the output's file, and prints the result.
part() {
    local what=$1 limit=$2 json='' status=0 began=$SECONDS result
    shift 2
    if [ "$1" = --json ]; then
        json=$2
        shift 2
    fi
    if [ -n "$part_seconds" ] && [ "$part_seconds" -lt "$limit" ]; then limit=$part_seconds; fi
    [ "$(left)" -ge "$limit" ] || limit=$(left)
    if [ "$limit" -lt 3 ]; then
        skip "$what" "no time left of $budget s"
        return
    fi
    printf '\n==> %s (at most %s s): %s\n' "$what" "$limit" "$*" >>"$log"
    if [ -n "$json" ]; then
        timeout --kill-after=3 "$limit" "$@" 2>&1 >>"$json" </dev/null | tee -a "$log" >"$work/output" || status=$?
    else
        timeout --kill-after=3 "$limit" "$@" 2>&1 </dev/null | tee -a "$log" >"$work/output" || status=$?
    fi
    case $status in
        0) result=ok ;;
        124 | 137) result="FAILED: not done after $limit s" ;;
        *) result="FAILED: exit status $status" ;;
    esac
    if declare -F "judge_${what%% *}" >/dev/null; then result=$("judge_${what%% *}" "$status" "$work/output" "$result"); fi
    {
        printf '\n### %s: %s\n\n    %s\n\n```text\n' "$what" "$result" "${*/#"$here/"/}"
        # A line a case says little where all is well.
        grep -v ' \.\.\. ok$' "$work/output" | tail -n 40 | cut -c 1-1000 || true
        printf '```\n'
    } >>"$work/sections"
    outcome "$what" "$result" $((SECONDS - began))
}

# clocks: what the GPU runs at; it is idle then.
clocks() {
    local query=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit
    if command -v nvidia-smi >/dev/null; then part clocks 10 nvidia-smi --format=csv --query-gpu="$query"; fi
}

# write_report running|ended: whole or not at all.
write_report() {
    {
        printf '# %s: %s on %s\n\n    %s\n\n' "$(date -u +%F)" "$name" "$gpu" "$command_line"
        printf 'Commit %s; %s s of at most %s.' "$(cat "$here/commit" 2>/dev/null || echo unknown)" $((SECONDS - started)) "$budget"
        [ "$1" = ended ] || printf ' **INCOMPLETE: it was running, or was ended, behind the last part below.**'
        printf '\n\n| part | result | seconds |\n| --- | --- | ---: |\n'
        [ ${#rows[@]} = 0 ] || printf '%s\n' "${rows[@]}"
        ! declare -F tables >/dev/null || tables
        printf '\n## Machine\n%stext\n%s\n%s\n' '```' "$doctor" '```'
        if [ -e "$work/sections" ]; then
            printf '\n## Parts\n'
            cat "$work/sections"
        fi
    } >"$report.partial"
    mv "$report.partial" "$report"
}

# finish: the exit status is 1 where a part failed.
finish() {
    write_report ended
    [ ${#not_run[@]} = 0 ] || printf 'NOT RUN: %s\n' "${not_run[@]}"
    [ ${#failed[@]} = 0 ] || printf 'FAILED: %s\n' "${failed[@]}"
    printf '%s: %s s\n' "$report" $((SECONDS - started))
    [ ${#failed[@]} = 0 ] || exit 1
}
