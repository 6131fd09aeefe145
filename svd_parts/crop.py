"""How much of a picture is lost where it is fitted to another aspect ratio, and which size would fit."""


def crop_loss(size, width, height):
    """The share of a picture of `size` (width, height) that is cut off where it covers `width` x `height`."""
    w, h = size
    return 1 - min(w * height, h * width) / max(w * height, h * width)


def describe_crop(size, width, height, multiple):
    """One line on what the crop takes away, with a size of as many pixels that fits; None where it is under 15 %.

    multiple: what width and height must be multiples of.
    """
    lost = crop_loss(size, width, height)
    if lost <= 0.15:
        return None
    ratios = size[0] / size[1], size[1] / size[0]
    fitting = [max(1, round((width * height * ratio) ** 0.5 / multiple)) * multiple for ratio in ratios]
    what = f"some {round(20 * lost) / 20:.0%} of the picture is lost to the crop to {width}x{height}"
    return f"{what}; --width {fitting[0]} --height {fitting[1]} would fit"


def describe_crops(sizes, width, height, multiple, word="clip"):
    """A line for each kind of size: `320x568 (3 clips): some 65% ...`. sizes: (w, h) of each clip, or `word`."""
    lines = []
    for size in sorted(set(sizes)):
        if what := describe_crop(size, width, height, multiple):
            count = sizes.count(size)
            lines.append(f"{size[0]}x{size[1]} ({count} {word}{'s' * (count > 1)}): {what}")
    return lines
