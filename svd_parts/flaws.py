"""Flaws of a video that no header tells of: repeated pictures, and black bars around the picture."""

import numpy as np

BLACK = 24  # of 255; black bars are not quite black, for the codec adds noise
LONGEST_REPEAT = 8  # pictures; a longer standstill is a pause, not a repeat


class Flaws:
    """Looks at a small copy of every frame of a video, and makes notes on repeated pictures and black bars."""

    def __init__(self):
        self.last, self.changes, self.rows, self.columns = None, [], 0, 0

    def add(self, frame):
        """Looks at the next frame, (H, W, 3) uint8."""
        step = max(1, min(frame.shape[:2]) // 96)
        small = frame[::step, ::step]
        if self.last is not None and self.last.shape == small.shape:
            self.changes.append(float(np.abs(small[..., 1].astype(np.int16) - self.last[..., 1]).mean()))
        self.last = small
        if isinstance(self.rows, int) or len(self.rows) == len(frame):  # frames of another size are passed over
            self.rows = np.maximum(self.rows, frame[:, ::step].max(axis=(1, 2)))
            self.columns = np.maximum(self.columns, frame[::step].max(axis=(0, 2)))

    def notes(self, fps):
        """[text] for the summary. fps: frames a second of the frames that were added."""
        return [note for note in (self.repeats(fps), *self.bars()) if note]

    def repeats(self, fps):
        """A note where pictures come several times, as in a video that copies brought to a higher rate; else None."""
        changes = np.array(self.changes)
        if len(changes) < 8:
            return None
        moves = np.percentile(changes, 95)
        still = changes <= 0.05 * moves
        if moves < 0.2 or still.sum() <= (~still & (changes <= 0.15 * moves)).sum():  # slow, without a clear line
            return None
        edges = np.flatnonzero(np.diff(np.concatenate([[0], still, [0]])))
        runs = edges[1::2] - edges[::2]  # lengths of the runs of pictures that do not change
        short = runs[runs < LONGEST_REPEAT]
        share = short.sum() / len(changes)
        if len(short) < 4 or share < 0.12:
            return None
        times, rate = round(1 / (1 - share)), fps * (1 - share)
        rate = round(rate) if abs(rate - round(rate)) < 0.3 else rate
        if times > 1 and abs(1 / (1 - share) - times) < 0.15:
            return f"each picture stands for {times} frames: --fps {fps / times:.3g} takes each once"
        return f"{share:.0%} of the frames repeat the one before: --fps {rate:.3g} takes each about once"

    def bars(self):
        """Yields a note on bars that are black in all frames and cover more than 5 % of the height or width."""
        for levels, what in ((self.rows, "height"), (self.columns, "width")):
            lit = np.flatnonzero(np.asarray(levels) > BLACK)
            if len(lit):
                before, after = lit[0], len(levels) - 1 - lit[-1]
                share = (before + after) / len(levels)
                if share > 0.05:
                    yield f"black bars: {share:.0%} of the {what}; cut them off first (ffmpeg -vf crop)"
