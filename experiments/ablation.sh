#!/usr/bin/env bash
# Pre-trains, probes and fine-tunes all rows of the tables of drawn videos in RESULTS.md. From the project's root:
#
#     bash experiments/ablation.sh results.jsonl                  all rows; run again, it goes on where it stopped
#     bash experiments/ablation.sh results.jsonl '^motions '      those rows of the list below that match
#     python -m experiments.table results.jsonl                   means ± standard deviations over seeds
#
# 1,000 videos to pre-train on, 100 labels, 500 other videos to test on. Each measurement appends a line {"row": ...,
# "seed": ..., "measure": ..., "value": ...} once. The measures: linear and knn probe and fine-tuned, top-1 in per cent;
# held-out, L_r of the test videos. A CMAE-V row takes ten minutes of one core of an AMD EPYC. On a GPU, change the next
# lines and the encoders in rows(); your own videos: data/SET/train.txt and val.txt.
set -euo pipefail
export RESULTS=${1:?give the file of results} OMP_NUM_THREADS=1
export COMMON="--recipe demo --workers 0"
export PRETRAIN="--epochs 20 --warmup-epochs 1 --picture-every 250 --save-every 1000"
export TUNE="--subset 100 --epochs 40 --val-every 0"
PROCESSES=2

rows() {  # set, name (s-: not fine-tuned), seed, encoder, flags of pretrain.py
    for seed in 0 1 2; do for set in scenes motions; do cat <<ROWS
$set none $seed vit_tiny
$set mae $seed vit_tiny --contrast-weight 0
$set cmaev $seed vit_tiny
$set noshift $seed vit_tiny --max-shift 0
ROWS
    done; done
    for seed in 0 1 2; do cat <<ROWS
motions p4 $seed vit_tiny --max-shift 4
motions p16 $seed vit_tiny --max-shift 16
ROWS
    done
    for seed in 0 1 2; do cat <<ROWS
looks none $seed vit_tiny
looks mae $seed vit_tiny --contrast-weight 0
looks cmaev $seed vit_tiny
ROWS
    done
    cat <<ROWS
scenes s-longmae 0 vit_tiny --epochs 60 --contrast-weight 0
scenes s-long 0 vit_tiny --epochs 60
scenes s-batch64 0 vit_tiny --batch-size 64 --micro-batch 16
scenes s-longbatch64 0 vit_tiny --batch-size 64 --micro-batch 16 --epochs 80
motions s-w.5 0 vit_tiny --contrast-weight 0.5
motions s-nocolor 0 vit_tiny --no-color-augment
motions s-batch64 0 vit_tiny --batch-size 64 --micro-batch 16
motions s-tau.2 0 vit_tiny --temperature 0.2
motions s-ratio.9 0 vit_tiny --mask-ratio 0.9
motions convmae 0 convvit_tiny --contrast-weight 0
motions convcmaev 0 convvit_tiny
ROWS
}

top1() {  # the accuracy in the last line of finetune.py; fails where there is none
    tail -n 1 | sed -n 's/.*top-1 \([0-9.]*\) %.*/\1/p' | grep .
}

row() {
    set -euo pipefail
    local data=data/$1 name=$1-$2 seed=$3 init=runs/$1-$2-$3 trained="" measures="held-out linear knn fine-tuned"
    local common="$COMMON --data $data/train.txt --val $data/val.txt --seed $3 --encoder $4" measure value
    local out=runs/few-$1-$2-$3
    case $2 in
        none) init=none trained=yes measures="linear knn fine-tuned" ;;
        s-*) measures="held-out linear knn" ;;
    esac
    shift 4
    for measure in $measures; do
        local line="{\"row\": \"$name\", \"seed\": $seed, \"measure\": \"$measure\", \"value\":"
        if grep -qsF "$line" "$RESULTS"; then continue; fi
        if [[ ! $trained ]]; then
            python pretrain.py $common --out $init $PRETRAIN "$@" >> $init.txt
            trained=yes
        fi
        case $measure in
            held-out)
                value=$(grep -o '"held_out_reconstruction": [0-9.]*' $init/log.jsonl | tail -n 1 | cut -d " " -f 2) ;;
            linear | knn)
                value=$(python finetune.py $common --init $init --subset 100 --probe $measure | top1) ;;
            fine-tuned)
                python finetune.py $common --init $init $TUNE --out $out >> $out.txt
                value=$(python finetune.py --eval --out $out | top1) ;;  # also of a run finished before
        esac
        echo "$line $value}" | tee -a "$RESULTS"
    done
}

export -f row top1
mkdir -p runs
rows | grep -E "${2:-.}" > runs/rows.txt
for set in scenes motions looks; do
    if grep -q "^$set " runs/rows.txt && [[ ! -e data/$set ]]; then
        python -m tools.demo_videos "data/$set" --kind "$set" --train 1000 --val 500 --seed 1
    fi
done
xargs -L 1 -P $PROCESSES bash -c 'row "$@"' _ < runs/rows.txt
