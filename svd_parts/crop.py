"""How much of a picture a crop to another aspect ratio loses, and which size would fit."""

from svd_parts.files import counted


def crop_loss(size, width, height):
    """The share (0 to 1) of a picture of `size` (width, height) that is cut off when it covers `width` x `height`."""
    w, h = size
    return 1 - min(w * height, h * width) / max(w * height, h * width)


def describe_crop(size, width, height, multiple):
    """One line on how much the crop loses, with a size of as many pixels that would fit. None up to a loss of 15 %.

    size: (width, height) of the picture. multiple: what the advised width and height must be multiples of.
    """
    lost = crop_loss(size, width, height)
    if lost <= 0.15:
        return None
    ratios = size[0] / size[1], size[1] / size[0]
    fitting = [max(1, round((width * height * ratio) ** 0.5 / multiple)) * multiple for ratio in ratios]
    what = f"some {round(20 * lost) / 20:.0%} of the picture is lost to the crop to {width}x{height}"
    if fitting == [width, height]:  # a small size, in steps of `multiple`
        return f"{what}; no size of as many pixels fits better"
    return f"{what}; --width {fitting[0]} --height {fitting[1]} would fit"


def describe_crops(sizes, width, height, multiple, word="clip"):
    """A line for each size that loses much: `320x568 (3 clips): some 65% ...`. sizes: (w, h) of each clip or `word`."""
    losses = {size: describe_crop(size, width, height, multiple) for size in sorted(set(sizes))}
    return [f"{w}x{h} ({counted(sizes.count((w, h)), word)}): {what}" for (w, h), what in losses.items() if what]
