#!/usr/bin/env bash
# On the board, one command: doctor, engines, latency, memory and quality of every backend, parity.
# The results are packed into a tarball.
#
#   benchmarks/jetson.sh [--bundle DIR] [--data DIR] [--out DIR] [--quick]
#
# PYTHON is the interpreter (default: .venv/bin/python of the checkout, else python3). --quick: two
# recordings only. A step that this machine cannot do is left out, with its reason. The exit status
# is 1 if a step failed. Results: DIR (default: work/jetson-TIME) and DIR.tar.gz; the last line of
# stdout is a JSON document.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bundle=$root/reference/bundle
data=$root/reference/voice
out=$root/work/jetson-$(date +%Y%m%d-%H%M%S)
measure_options=()
failed=0

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

while (($#)); do
    case $1 in
        --bundle | --data | --out)
            [[ $# -ge 2 ]] || { echo "jetson.sh: $1 needs a folder" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$(realpath -m "$2")"
            shift 2
            ;;
        --quick)
            measure_options=(--limit 2)
            shift
            ;;
        -h | --help) usage; exit 0 ;;
        *) echo "jetson.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
done

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$root/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
for needed in "$bundle/manifest.json" "$data"; do
    if [[ ! -e $needed ]]; then
        echo "jetson.sh: $needed does not exist: give --bundle and --data" >&2
        exit 2
    fi
done
cd "$root"
mkdir -p "$out"
: >"$out/steps.tsv"

note() { # step, state, reason
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$out/steps.tsv"
    echo "== $1: $2${3:+, $3}" >&2
}

step() { # step, command: stdout goes to STEP.json, stderr to the terminal and STEP.log
    local name=$1
    shift
    echo "== $name" >&2
    if { "$@" >"$out/$name.json"; } 2>&1 | tee "$out/$name.log" >&2; then
        note "$name" "done" ""
    else
        note "$name" failed "see $name.log"
        failed=1
    fi
}

step_if() { # what the machine must be able to do (see `jetson can`), then as for step
    local reason status=0
    reason=$(jetson can "$1") || status=$?
    case $status in
        0) step "${@:2}" ;;
        3) note "$2" "left out" "$reason" ;;
        *) note "$2" failed "benchmarks.studies.jetson can $1" && failed=1 ;;
    esac
}

# shellcheck disable=SC2329 # step calls them
tiny_align() { "$PYTHON" -m tiny_align.runtime.commands.cli "$@" --json; }
jetson() { "$PYTHON" -m benchmarks.studies.jetson "$@"; }
measured=(--bundle "$bundle" --data "$data" --out "$out" "${measure_options[@]}")

step doctor tiny_align doctor --bundle "$bundle"
# engines first, while memory is not fragmented
step_if build build tiny_align build-engines --bundle "$bundle" --data "$data"
step measure-onnxruntime jetson measure --backend onnxruntime "${measured[@]}"
step_if tensorrt measure-tensorrt jetson measure --backend tensorrt "${measured[@]}"
step_if tensorrt swap "$PYTHON" -m benchmarks.studies.swap --json \
    --bundle "$bundle" --out "$out/swap-results.json"
step parity jetson compare --out "$out"
step doctor-after tiny_align doctor # how the work has changed clocks, temperatures and memory

jetson report --out "$out" >"$out/report.txt"
tail -n 1 "$out/report.txt" >"$out/report.json"
tar -C "$(dirname "$out")" -czf "$out.tar.gz" "$(basename "$out")"
echo "results in $out.tar.gz" >&2
cat "$out/report.txt"
exit "$failed"
