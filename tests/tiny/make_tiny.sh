#!/bin/sh
# Makes tests/tiny_svd again from nothing, into .dev/tiny_svd: render, VAE, image encoder, then the UNet by train_svd.py.
# Hours on a CPU. What it printed when the bundled checkpoint was made stands in tests/tiny/README.md.
set -eu
PYTHON=${PYTHON:-python}
OUT=.dev/tiny
MODEL=.dev/tiny_svd
STEPS=${STEPS:-6000}

$PYTHON tests/tiny/render.py --task reach --episodes 700 --cameras front side --output_dir $OUT/reach
$PYTHON tests/tiny/render.py --task push --episodes 200 --seed 1 --cameras front side --output_dir $OUT/push
mkdir -p $MODEL
for stage in vae clip unet-init; do
    $PYTHON tests/tiny/make_tiny.py --stage $stage --output_dir $MODEL
done

$PYTHON prepare_dataset.py --video_dir $OUT/reach --output_dir $OUT/dataset
$PYTHON train_svd.py --pretrained_model_name $MODEL --dataset_dir $OUT/dataset --output_dir $OUT/unet \
    --num_frames 8 --width 96 --height 64 --train_batch_size 4 --learning_rate 5e-4 --trainable all \
    --max_train_steps "$STEPS" --lr_scheduler constant_with_warmup --lr_warmup_steps 200 \
    --use_ema --ema_decay 0.999 --checkpointing_steps 250
echo "$OUT/unet is the checkpoint; tests/tiny_svd is a copy of its five parts and model_index.json"
