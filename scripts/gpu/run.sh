#!/usr/bin/env bash
# Check the GPU path in at most ten minutes, in the order of what is worth most; a part that fails or runs out of its time costs no
# other. Ends with 0 if all parts did. The whole report is in $OUT/report.txt.
#   bash scripts/gpu/run.sh                          on a machine with one GPU
#   TINY=1 bash scripts/gpu/run.sh                   the same code over models of a few kB, without a GPU
#   PARTS="env smoke" bash scripts/gpu/run.sh        some parts
# SLOW=3 gives every part three times its time, WHOLE=1800 all parts half an hour, PYTHON=... another interpreter. Limits are those
# of a machine with a GPU; without one, where nothing is lent by the minute, they are six times as long.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cd "$root" || exit 1
export PYTHONPATH="$root:$here:$root/scripts${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
out=${OUT:-/tmp/gpu_out}
mkdir -p "$out"
: >"$out/report.txt"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
all="env smoke bench syncs pieces profile whole tests invariance scoring memory ranks"
declare -A limits=([env]=40 [smoke]=75 [bench]=130 [syncs]=30 [pieces]=60 [profile]=60 [whole]=90 [tests]=75 [invariance]=50 [scoring]=40 [memory]=40 [ranks]=60)
slow=${SLOW:-${TINY:+6}} slow=${slow:-1} whole=${WHOLE:-$((560 * slow))} began=$SECONDS failed=()

run_part() { # PART SECONDS
    if [ "$1" = tests ]; then
        timeout -k 5 "$2" "$python" -m pytest -q --maxfail=15 -p cuda_plugin -p no:cacheprovider --timeout=60 \
            tests/inference/test_engine.py ${TINY:+-k "sixteen or another_seed"} 2>&1 | tail -60
    else
        timeout -k 5 "$2" "$python" "$here/check.py" "$1" ${TINY:+--tiny} 2>&1
    fi
}

for part in ${PARTS:-$all}; do
    left=$((whole - (SECONDS - began))) limit=$((${limits[$part]:?no such part: $part} * slow))
    [ "$limit" -le "$left" ] || limit=$left
    code=124
    if [ "$limit" -lt 8 ]; then
        echo "#### $part: no time left"
    else
        echo "#### $part (at most $limit s, $((SECONDS - began)) s gone)"
        run_part "$part" "$limit" | tee -a "$out/report.txt" | cut -c1-400 | tail -"${LINES_SHOWN:-45}"
        code=${PIPESTATUS[0]}
    fi
    echo "#### $part ended with $code" | tee -a "$out/report.txt"
    [ "$code" = 0 ] || failed+=("$part")
done
echo "#### all: $((SECONDS - began)) s, ${#failed[@]} parts failed: ${failed[*]:-none}" | tee -a "$out/report.txt"
command -v nvidia-smi >/dev/null && nvidia-smi >"$out/nvidia-smi.txt"
exit $((${#failed[@]} > 0))
