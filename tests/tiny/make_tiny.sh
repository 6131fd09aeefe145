#!/bin/sh
# Makes tests/tiny_svd again from nothing, into .dev: render, VAE, image encoder, then the UNet by train_svd.py.
# Some eight hours of a CPU. What it printed, and how the bundled one was made: README.md here.
set -eu
PYTHON=${PYTHON:-python}
OUT=.dev/tiny
MODEL=.dev/tiny_svd
CAMERAS="--cameras front side"

$PYTHON tests/tiny/render.py --task reach --episodes 700 $CAMERAS --output_dir $OUT/reach
$PYTHON tests/tiny/render.py --task touch --episodes 260 --seed 2 $CAMERAS --output_dir $OUT/touch
$PYTHON tests/tiny/render.py --task shove --episodes 240 --seed 3 $CAMERAS --output_dir $OUT/shove
$PYTHON tests/tiny/render.py --task deliver --episodes 350 --seed 4 $CAMERAS --output_dir $OUT/deliver
$PYTHON tests/tiny/render.py --task point --episodes 150 --seed 5 $CAMERAS --output_dir $OUT/point
$PYTHON tests/tiny/render.py --task push --episodes 200 --seed 1 $CAMERAS --output_dir $OUT/push
mkdir -p $MODEL
for stage in vae clip unet-init; do
    $PYTHON tests/tiny/make_tiny.py --stage $stage --output_dir $MODEL
done

# the UNet: random motion first, then motion that the first frame foretells more and more, with a falling learning rate
train() {
    $PYTHON train_svd.py --num_frames 8 --width 96 --height 64 --train_batch_size 4 --trainable all --use_ema \
        --gradient_checkpointing none "$@"
}
prepare() {
    $PYTHON prepare_dataset.py --video_dir $OUT --output_dir "$@"
}
prepare $OUT-dataset-1 --include 'reach/*'
prepare $OUT-dataset-2 --include 'touch/*' 'shove/*' 'reach/*0000[0-9]?.mp4'
prepare $OUT-dataset-3 --include 'deliver/*' 'point/*' 'reach/*0000[0-7]?.mp4'
train --pretrained_model_name $MODEL --dataset_dir $OUT-dataset-1 --output_dir $OUT-unet-1 --max_train_steps 3750 \
    --learning_rate 5e-4 --lr_scheduler constant_with_warmup --lr_warmup_steps 200 --ema_decay 0.999
train --pretrained_model_name $OUT-unet-1 --dataset_dir $OUT-dataset-2 --output_dir $OUT-unet-2 --max_train_steps 5000 \
    --learning_rate 7e-4 --lr_scheduler cosine --lr_warmup_steps 50 --ema_decay 0.997 --P_mean 0.3
train --pretrained_model_name $OUT-unet-2 --dataset_dir $OUT-dataset-3 --output_dir $OUT-unet-3 --max_train_steps 5500 \
    --learning_rate 7e-4 --lr_scheduler cosine --lr_warmup_steps 50 --ema_decay 0.997 --P_mean 1.2

# more of the foretold motion, on new clips, with twice the batch
$PYTHON tests/tiny/render.py --task deliver --episodes 700 --seed 14 --output_dir $OUT-4/deliver
$PYTHON tests/tiny/render.py --task deliver --episodes 300 --seed 24 --cameras side --output_dir $OUT-4/deliver_side
$PYTHON tests/tiny/render.py --task point --episodes 260 --seed 15 --output_dir $OUT-4/point
$PYTHON tests/tiny/render.py --task reach --episodes 100 --seed 16 --output_dir $OUT-4/reach
$PYTHON prepare_dataset.py --video_dir $OUT-4 --output_dir $OUT-dataset-4
train --pretrained_model_name $OUT-unet-3 --dataset_dir $OUT-dataset-4 --output_dir $OUT-unet-4 --max_train_steps 1118 \
    --train_batch_size 8 --learning_rate 5e-4 --lr_scheduler cosine --lr_warmup_steps 100 --ema_decay 0.99 --P_mean 1.2
train --pretrained_model_name $OUT-unet-4 --dataset_dir $OUT-dataset-4 --output_dir $OUT-unet-5 --max_train_steps 2400 \
    --train_batch_size 8 --learning_rate 6e-4 --lr_scheduler cosine --lr_warmup_steps 60 --ema_decay 0.99 --P_mean 1.2

# and more clips again; then the VAE's decoder alone, on the same
$PYTHON tests/tiny/render.py --task deliver --episodes 600 --seed 34 --output_dir $OUT-4/deliver_more
$PYTHON tests/tiny/render.py --task deliver --episodes 150 --seed 44 --cameras side --output_dir $OUT-4/deliver_side_more
$PYTHON tests/tiny/render.py --task point --episodes 150 --seed 35 --output_dir $OUT-4/point_more
$PYTHON prepare_dataset.py --video_dir $OUT-4 --output_dir $OUT-dataset-5
train --pretrained_model_name $OUT-unet-5 --dataset_dir $OUT-dataset-5 --output_dir $OUT-unet-6 --max_train_steps 3000 \
    --train_batch_size 8 --learning_rate 6e-4 --lr_scheduler cosine --lr_warmup_steps 60 --ema_decay 0.99 --P_mean 1.2
$PYTHON tests/tiny/make_tiny.py --stage decoder --dataset_dir $OUT-dataset-5 --output_dir $OUT-unet-6
echo "$OUT-unet-6 is the checkpoint; tests/tiny_svd is a copy of its five parts and model_index.json, UNet and VAE in fp16"
