"""A network's answers as HTML: the paper's figure 4 on the reader's own images, and the classes it confuses most."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs.answers import Answers, confusions
from pipeline.dataset import DatasetInfo
from pipeline.split_reader import SplitReader

THUMBNAIL = 144  # Pixels a side: twice what is shown, for screens that have them.
WORST = 20  # Classes in the table


def gallery(answers: Answers, data: Path, info: DatasetInfo) -> str:
    """The page's sections about a shard set."""
    val, train = (SplitReader(data, info, split) for split in ("val", "train"))
    names = [label.name for label in info.classes]
    looked = len(answers.val_labels)
    return "\n".join(
        [
            "<h2>Validation images and their most probable classes</h2>",
            "<p>The first of the set, not chosen; the true class above, its bar in green (the paper's figure 4, left)."
            "</p>",
            f'<div class="cards">{"".join(_cards(answers, val, names))}</div>',
            "<h2>Nearest training images</h2>",
            f"<p>By the Euclidean distance of fc7's outputs, among {answers.train_images:,} of {len(train):,} training "
            "images (the paper's figure 4, right). Green: of the same class.</p>",
            f'<div class="scroll">{_neighbours(answers, val, train, names)}</div>',
            "<h2>Classes most often mistaken</h2>",
            f"<p>{looked:,} of {len(val):,} validation images, by the centre crop.</p>",
            f'<div class="scroll">{_confusions(answers, names)}</div>',
        ]
    )


def _thumbnail(pixels: NDArray[np.uint8], label: str) -> str:
    buffer = io.BytesIO()
    small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img class="thumbnail" src="{source}" alt="{html.escape(label)}">'


def _cards(answers: Answers, val: SplitReader, names: list[str]) -> list[str]:
    cards = []
    for sample, (top, values) in enumerate(zip(answers.top, answers.probabilities, strict=True)):
        truth = int(val.labels[sample])
        bars = "".join(
            f'<li class="{"right" if label == truth else ""}"><span style="width:{value:.1%}"></span>'
            f"<b>{html.escape(names[label])}</b><i>{value:.0%}</i></li>"
            for label, value in zip(top.tolist(), values.tolist(), strict=True)
        )
        name = html.escape(names[truth])
        image = _thumbnail(val.decoded(sample), names[truth])
        cards.append(f'<figure class="card">{image}<div><figcaption>{name}</figcaption><ol>{bars}</ol></div></figure>')
    return cards


def _neighbours(answers: Answers, val: SplitReader, train: SplitReader, names: list[str]) -> str:
    rows = []
    for sample, nearest in enumerate(answers.nearest.tolist()):
        truth = int(val.labels[sample])
        cells = [f"<td>{_thumbnail(val.decoded(sample), names[truth])}<small>{html.escape(names[truth])}</small></td>"]
        for other in nearest:
            label = int(train.labels[other])
            same = "right" if label == truth else ""
            image = _thumbnail(train.decoded(other), names[label])
            cells.append(f'<td class="{same}">{image}<small>{html.escape(names[label])}</small></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = f'<tr><th>validation</th><th colspan="{answers.nearest.shape[1]}">training, nearest first</th></tr>'
    return f'<table class="neighbours">{head}{"".join(rows)}</table>'


def _confusions(answers: Answers, names: list[str]) -> str:
    heads = "<th>class</th><th>error</th><th>images</th>"
    lines = [f'<tr>{heads}<th class="text">most often taken for</th></tr>']
    for row in confusions(answers.val_labels, answers.predicted, len(names))[:WORST]:
        taken = f"{html.escape(names[row.mistaken_for])} ({row.as_that} of {row.images})" if row.wrong else "-"
        lines.append(
            f"<tr><td>{html.escape(names[row.label])}</td><td>{row.wrong / row.images:.1%}</td>"
            f'<td>{row.images}</td><td class="text">{taken}</td></tr>'
        )
    return f"<table>{''.join(lines)}</table>"
