#!/usr/bin/env bash
# Everything that is to be seen on a machine with a GPU, in under nine minutes: doctor, GPU tests, benches, runs that must
# be equal to the bit, and a suite. No Rust is needed there: binaries are built elsewhere and carried.
#
#   tests/gpu.sh OUT DINOLAB [TEST_BINARY...]
#
# Built like this, at the repository's root:
#
#   cargo build --release
#   cargo test --release --no-run -p dinolab-tests --message-format=json |
#     jq -r 'select(.executable and (.target.name | startswith("gpu_"))).executable'
#
# OUT gets a log of every part, bench results as JSON, and summary.txt. Where python3 has PyTorch, the same steps in PyTorch
# (tests/torch_step.py) are timed beside ours. CUDA's libraries are looked for on LD_LIBRARY_PATH.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
dinolab=$(realpath "$2")
shift 2
tests=()
for test in "$@"; do tests+=("$(realpath "$test")"); done
cd "$(dirname "$0")/.."
export DINOLAB_CACHE=$out/cache
end=$((SECONDS + 530))
failed=0

note() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$out/summary.txt"; }

# part NAME SECONDS COMMAND...: runs a part with its log in OUT/NAME.log, for at most so long and not beyond the end.
part() {
    local name=$1 most=$2 left=$((end - SECONDS))
    shift 2
    if [ "$left" -lt 5 ]; then note "$name: left out, no time"; failed=1; return 1; fi
    timeout -k 5 "$((most < left ? most : left))" "$@" >"$out/$name.log" 2>&1
    local status=$?
    if [ "$status" = 0 ]; then note "$name: passed"; return 0; fi
    note "$name: FAILED ($status; 124 is out of time), see $name.log"
    tail -n 5 "$out/$name.log" | tee -a "$out/summary.txt"
    failed=1
    return 1
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1 || note "no nvidia-smi"
part doctor 120 "$dinolab" doctor
for test in "${tests[@]}"; do
    # Names of test programs end in a hash.
    part "$(basename "${test%-*}")" 100 "$test"
done

for recipe in vit_s16_b64 vit_b16_b64 vit_l16_b64 vit_s16_gram_b64 vit_l16_gram_b32 vit_s16_b256; do
    part "bench_$recipe" 60 "$dinolab" bench "recipes/bench/$recipe.toml" --device cuda --steps 20 --json &&
        tail -n 1 "$out/bench_$recipe.log" >"$out/bench_$recipe.json" &&
        note "  $(grep -o '"ms_median":[^,]*,\|"images_per_s":[^,]*,\|"mfu":[^,]*,\|"peak_gib":[^,]*,\|"first_step_s":[^,]*' "$out/bench_$recipe.json" | tr '\n' ' ')"
done

# Three runs with one seed, the third launch by launch (a step that is logged is not replayed): their weights
# and moments are equal to the bit.
run() {
    part "run_$1" 60 "$dinolab" train recipes/tiny.toml --device cuda --out "$out/run_$1" \
        --set steps=60 --set checkpoint.every=0 --set "log.every=$2"
}
run a 30
run b 30
run eager 1
for other in b eager; do
    if [ ! -f "$out/run_a/result.json" ] || [ ! -f "$out/run_$other/result.json" ]; then
        note "runs a and $other are not there to be compared"
        failed=1
    elif (cd "$out/run_a" && find checkpoints -name '*.safetensors' -exec cmp {} "../run_$other/{}" \; 2>&1 | grep .) >"$out/same_$other.log"; then
        note "runs a and $other DIFFER, see same_$other.log"
        failed=1
    else
        note "runs a and $other are equal to the bit"
    fi
done

# A step that is not finite, on a card that is filled to more than half: it is skipped, and the place is named.
spike=$(dirname "$dinolab")/with_plugins
if [ -x "$spike" ]; then
    part skip 60 "$spike" train recipes/bench/vit_b16_b64.toml --device cuda --out "$out/skip" --set steps=4 \
        --set "batch.size=${SKIP_BATCH:-192}" --set losses.toy_spike.at_step=2 --set 'on_non_finite={ skip = 1 }' &&
        note "  $(grep -o '"skipped": *[0-9]*' "$out/skip/result.json"), $(nvidia-smi --query-gpu=memory.total --format=csv,noheader)"
fi

part gram_on_off 120 "$dinolab" ablate ablations/gram_on_off.toml --device cuda --out "$out/gram_on_off" --seeds 0,1 --steps 200

if python3 -c "import torch" 2>>"$out/torch.log"; then
    shape="--patch 16 --global-size 256 --local-size 112 --locals 8 --prototypes 65536 --head-hidden 2048 --bottleneck 256"
    for peer in "vit_s16_b64 --dim 384 --depth 12 --heads 6 --batch 64" "vit_l16_b64 --dim 1024 --depth 24 --heads 16 --batch 64" \
        "vit_s16_gram_b64 --dim 384 --depth 12 --heads 6 --batch 64 --gram-size 512"; do
        # shellcheck disable=SC2086
        set -- $peer
        for how in "" --compile; do
            # shellcheck disable=SC2086
            part "peer_$1$how" 90 python3 tests/torch_step.py $shape "${@:2}" $how --steps 10 --device cuda --dtype bf16 &&
                note "  $(tail -n 1 "$out/peer_$1$how.log")"
        done
    done
fi
[ "$failed" = 0 ] && note "all passed" || note "something failed"
exit "$failed"
