"""crop.py: what is lost, and the size that would fit."""

from svd_parts.crop import crop_loss, describe_crop


def test_the_advised_size_has_the_pictures_aspect_and_is_another_one():
    assert crop_loss((1024, 576), 512, 288) == 0 and crop_loss((200, 100), 100, 100) == 0.5
    assert describe_crop((1024, 576), 512, 320, 64) is None
    assert describe_crop((320, 568), 512, 320, 64).endswith("65% of the picture is lost to the crop to 512x320;"
        " --width 320 --height 512 would fit")  # fmt: skip
    assert describe_crop((1152, 560), 64, 64, 64).endswith("to 64x64; no size of as many pixels fits better")
