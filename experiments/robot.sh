#!/usr/bin/env bash
# Pre-trains, probes and fine-tunes on the videos of experiments/robot_videos.py. From the project's root:
#
#     python -m experiments.robot_videos data/robot
#     PROCESSES=2 bash experiments/robot.sh results.jsonl         all rows; run again, it goes on where it stopped
#     bash experiments/robot.sh results.jsonl '^(none|mae) 0'     those rows of the list below that match
#     python -m experiments.table results.jsonl                   means ± standard deviations over seeds
#
# As in experiments/ablation.sh: 1,000 videos to pre-train on, 500 others to test on; 30 labels for linear and k-NN
# probes, 100 for fine-tuning. The rows still-* see the middle frame alone, with the untrained encoder and with
# VideoMAE's. Measures: see pairs.py and ablation.sh. A row appends its lines at its end.
set -euo pipefail
export RESULTS=${1:?give the file of results} OMP_NUM_THREADS=1
export COMMON="--recipe demo --rate 5 --workers 0"  # rate 5: 36 of the 48 frames
export PRETRAIN="--epochs 20 --warmup-epochs 1 --picture-every 0 --save-every 1000"
export TUNE="--subset 100 --epochs 40 --val-every 0"

rows() {  # name, seed, flags of pretrain.py
    for seed in 0 1 2; do cat <<ROWS
none $seed
mae $seed --contrast-weight 0
cmaev $seed
noshift $seed --max-shift 0
ROWS
    done
}

stills() {
    for seed in 0 1 2; do printf 'still-none %s\nstill-mae %s\n' $seed $seed; done
}

row() {
    set -euo pipefail
    local name=$1 seed=$2 data=data/robot init=runs/robot-$1-$2 out=runs/robot-few-$1-$2
    shift 2
    if grep -qsF "{\"row\": \"robot-$name\", \"seed\": $seed," "$RESULTS"; then return; fi
    case $name in
        still-*) data=data/robot/still init=runs/robot-${name#still-}-$seed ;;
    esac
    local common="$COMMON --data $data/train.txt --val $data/val.txt --seed $seed"
    case $name in
        *none) init=none ;;
        still-*) ;;
        *) python pretrain.py $common --out $init $PRETRAIN "$@" >> $init.txt
           grep -o '"held_out_reconstruction": [0-9.]*' $init/log.jsonl | tail -n 1 | sed 's/.* /held-out /' ;;
    esac > $out.values
    python -m experiments.pairs $common --init $init >> $out.values
    python finetune.py $common --init $init $TUNE --out $out >> $out.txt
    python finetune.py --eval --out $out | sed -n 's/.*top-1 \([0-9.]*\) %.*/fine-tuned \1/p' >> $out.values
    python -m experiments.pairs $out/eval-*/predictions.csv >> $out.values
    sed -En "s/^(\S+) ([0-9.]+)$/{\"row\": \"robot-$name\", \"seed\": $seed, \"measure\": \"\1\", \"value\": \2}/p" \
        $out.values | tee -a "$RESULTS"
}

export -f row
mkdir -p runs
for list in rows stills; do  # the stills need VideoMAE's runs
    $list | { grep -E "${2:-.}" || true; } | xargs -r -L 1 -P "${PROCESSES:-2}" bash -c 'row "$@"' _
done
