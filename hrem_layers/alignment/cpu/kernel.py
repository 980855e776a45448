r"""The compiled kernels: what is computed from the products of one text after another with a chunk of images.

``x`` (words, regions) is a tile of the product. The words of a text are adjacent rows. The columns stand *place by
place*: the first region of every image, then the second of all that have one, and so on, the images sorted by their
number of regions, the one with most first. So images without a p-th region are missing at the end of place p, whatever
the masks are nothing is padded, and every innermost loop goes over images, along memory, in vector instructions.

A *place list* ``places`` (m + 1,) says where each place begins. The values of a text's words are laid out likewise, a
place a word, with all images in each; so both directions are pooled by the same functions.

The formulas are those of :mod:`hrem_layers.alignment.block`. No value may be NaN: what calls these kernels has seen
to it. They are compiled when first called, for float32 or float64, and what was compiled is kept in a cache on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np

from hrem_layers.alignment.block import LEAKY_SLOPE
from hrem_layers.alignment.cpu.arguments import Array, ImageColumns, ScoreArrays, TextRows


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def compile_later(function: Callable[..., Any]) -> Callable[..., Any]:
        compiler = functools.partial(numba.njit, nogil=True, error_model="numpy", **options)
        try:
            return cast(Callable[..., Any], compiler(cache=True)(function))
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            return cast(Callable[..., Any], compiler()(function))

    return compile_later


@_compiled(fastmath={"reassoc", "contract"})
def unit_rows(values: Array, source: Array, least: float, most: float, out: Array, inverse: Array) -> bool:
    """Writes ``values[source]`` / length to ``out`` and 1 / length to ``inverse``; whether every length² lies between
    ``least`` and ``most``, which no NaN does. If not, what was written is of no use."""
    usual = True
    for row in range(len(out)):
        given, written = values[source[row]], out[row]
        square = values.dtype.type(0)
        for j in range(len(written)):
            square += given[j] * given[j]
        usual &= (square > least) & (square < most)
        scale = values.dtype.type(1) / np.sqrt(square)
        inverse[row] = scale
        for j in range(len(written)):
            written[j] = given[j] * scale
    return usual


@_compiled(fastmath={"reassoc", "contract"})
def unit_rows_grad(unit: Array, grad: Array, inverse: Array, source: Array, out: Array) -> None:
    """Of x̂ = x / ‖x‖: writes (g − x̂ <x̂, g>) / ‖x‖ to ``out[source]``."""
    for row in range(len(unit)):
        x, g, written = unit[row], grad[row], out[source[row]]
        along = grad.dtype.type(0)
        for j in range(len(x)):
            along += x[j] * g[j]
        for j in range(len(x)):
            written[j] = (g[j] - x[j] * along) * inverse[row]


@_compiled()
def pool_texts(x: Array, images: ImageColumns, scan: bool, least: float, out: ScoreArrays, texts: TextRows) -> None:
    """Writes p and q of the texts, whose words are rows of ``x`` (words, regions), with the images. ``least``: of a
    norm², in mode "scan"."""
    places, n, widest = images.places, len(images.images), np.max(np.diff(texts.starts))
    word_places = np.arange(widest + 1) * n
    f, g = np.empty(widest * n, x.dtype), np.empty(places[-1], x.dtype)
    per_word, per_region = np.empty_like(f), np.empty_like(g)
    total, top = np.empty(n, x.dtype), np.empty((out.top_t2i.shape[2], n), x.dtype)
    for a in range(len(texts.texts)):
        t, s = texts.texts[a], x[texts.starts[a] : texts.starts[a + 1]]
        w = len(s)
        if scan:
            _norms(s, places, least, per_word, per_region)
        _maxima(s, places, scan, per_word, per_region, f, g)
        _pool(f, word_places[: w + 1], total, top)
        for b in range(n):
            i = images.images[b]
            out.mean_t2i[t, i] = total[b] / w
            for j in range(len(top)):
                out.top_t2i[t, i, j] = top[j, b] if j < w else 0
        _pool(g, places, total, top)
        for b in range(n):
            i = images.images[b]
            out.mean_i2t[i, t] = total[b] / images.lengths[b]
            for j in range(len(top)):
                out.top_i2t[i, t, j] = top[j, b] if j < images.lengths[b] else 0


@_compiled()
def pool_texts_grad(
    s: Array, images: ImageColumns, scan: bool, least: float, scores: ScoreArrays, out: Array, texts: TextRows
) -> None:
    """Writes to ``out`` (words, regions) the gradient of x, given s and that of the ``scores``."""
    places, n, widest = images.places, len(images.images), np.max(np.diff(texts.starts))
    word_places = np.arange(widest + 1) * n
    f, g = np.empty(widest * n, s.dtype), np.empty(places[-1], s.dtype)
    per_word, per_region = np.empty_like(f), np.empty_like(g)
    grad_f, grad_g = np.empty_like(f), np.empty_like(g)
    spare_f, spare_g = np.empty_like(f), np.empty_like(g)
    mean, margin = np.empty(n, s.dtype), np.empty(n, s.dtype)
    for a in range(len(texts.texts)):
        t, rows = texts.texts[a], slice(texts.starts[a], texts.starts[a + 1])
        x, grad = s[rows], out[rows]
        w = len(x)
        if scan:
            _norms(x, places, least, per_word, per_region)
        _maxima(x, places, scan, per_word, per_region, f, g)
        k = min(w, scores.top_t2i.shape[2])
        top = np.empty((k, n), s.dtype)
        for b in range(n):
            i = images.images[b]
            margin[b] = texts.scale[a] * images.scale[b]
            mean[b] = scores.mean_t2i[t, i] / w
            for j in range(k):
                top[j, b] = scores.top_t2i[t, i, j]
        _pool_grad(f, word_places[: w + 1], mean, top, margin, spare_f, grad_f)
        k = min(len(places) - 1, scores.top_i2t.shape[2])
        top = np.zeros((k, n), s.dtype)
        for b in range(n):
            i = images.images[b]
            mean[b] = scores.mean_i2t[i, t] / images.lengths[b]
            for j in range(min(images.lengths[b], k)):
                top[j, b] = scores.top_i2t[i, t, j]
        _pool_grad(g, places, mean, top, margin, spare_g, grad_g)
        _share(x, places, margin, scan, per_word, per_region, f, g, grad_f, grad_g, spare_f, spare_g)
        if scan:
            _scan_grad(x, places, margin, per_word, per_region, f, g, grad_f, grad_g, spare_f, spare_g, grad)
        else:
            _grad(x, places, margin, f, g, grad_f, grad_g, grad)


@_compiled()
def _norms(s: Array, places: Array, least: float, per_word: Array, per_region: Array) -> None:
    """1 / ‖s‖ of each word over the regions of each image, and of each region over the words; 0 for a square below
    ``least``."""
    n, zero, one = places[1], s.dtype.type(0), s.dtype.type(1)
    per_word[: len(s) * n] = 0
    per_region[:] = 0
    for w in range(len(s)):
        row, words = s[w], per_word[w * n : (w + 1) * n]
        for p in range(len(places) - 1):
            values, regions = row[places[p] : places[p + 1]], per_region[places[p] : places[p + 1]]
            for i in range(len(values)):
                square = values[i] * values[i]
                words[i] += square
                regions[i] += square
    for i in range(len(s) * n):
        per_word[i] = one / np.sqrt(per_word[i]) if per_word[i] > least else zero
    for i in range(len(per_region)):
        per_region[i] = one / np.sqrt(per_region[i]) if per_region[i] > least else zero


@_compiled()
def _maxima(s: Array, places: Array, scan: bool, per_word: Array, per_region: Array, f: Array, g: Array) -> None:
    n, m = places[1], len(places) - 1
    f[: len(s) * n] = -np.inf
    g[:] = -np.inf
    # Where all images have m regions, four strips of places are folded into one first: few images make short loops.
    strip = m // 4 if places[m] == m * n and not scan else 0
    folded, size = np.empty(strip * n, s.dtype), strip * n
    for w in range(len(s)):
        row, words, norms = s[w], f[w * n : (w + 1) * n], per_word[w * n : (w + 1) * n]
        for p in range(4 * strip, m):
            values, regions = row[places[p] : places[p + 1]], g[places[p] : places[p + 1]]
            if scan:
                region_norms = per_region[places[p] : places[p + 1]]
                for i in range(len(values)):
                    to_word, to_region = values[i] * region_norms[i], values[i] * norms[i]
                    words[i] = to_word if to_word > words[i] else words[i]
                    regions[i] = to_region if to_region > regions[i] else regions[i]
            else:
                for i in range(len(values)):
                    words[i] = values[i] if values[i] > words[i] else words[i]
                    regions[i] = values[i] if values[i] > regions[i] else regions[i]
        if strip:
            for i in range(4 * size):
                g[i] = row[i] if row[i] > g[i] else g[i]
            for i in range(size):
                x = row[i] if row[i] > row[size + i] else row[size + i]
                y = row[2 * size + i] if row[2 * size + i] > row[3 * size + i] else row[3 * size + i]
                folded[i] = x if x > y else y
            for p in range(strip):
                values = folded[p * n : (p + 1) * n]
                for i in range(n):
                    words[i] = values[i] if values[i] > words[i] else words[i]


@_compiled()
def _pool(values: Array, places: Array, total: Array, top: Array) -> None:
    """Each column's sum and its largest values in descending order, −inf where there is none. Overwrites ``values``.

    Each value falls through the largest so far, which stay sorted: it takes the place of the first that is smaller,
    which falls on.
    """
    total[:] = 0
    top[:] = -np.inf
    for p in range(len(places) - 1):
        falling = values[places[p] : places[p + 1]]
        for i in range(len(falling)):
            total[i] += falling[i]
        for j in range(min(p + 1, len(top))):
            stays = top[j]
            for i in range(len(falling)):
                x, y = stays[i], falling[i]
                stays[i] = x if x > y else y
                falling[i] = y if x > y else x


@_compiled()
def _pool_grad(
    values: Array, places: Array, mean: Array, grad_top: Array, margin: Array, spare: Array, grad: Array
) -> None:
    """Writes to ``grad`` that of the values: the mean's, and of each place of q an equal part to all that tie with it.
    ``grad_top`` (k, n) is overwritten."""
    k, n, m = len(grad_top), len(mean), len(places) - 1
    zero, one = values.dtype.type(0), values.dtype.type(1)
    top, tied = np.empty((k, n), values.dtype), np.zeros((k, n), values.dtype)
    if k:
        spare[: places[-1]] = values[: places[-1]]
        _pool(spare, places, np.empty(n, values.dtype), top)
    for p in range(m if k else 0):
        value = values[places[p] : places[p + 1]]
        for j in range(k):
            largest, count = top[j], tied[j]
            for i in range(len(value)):
                count[i] += one if abs(value[i] - largest[i]) <= margin[i] else zero
    for j in range(k):
        for i in range(n):
            grad_top[j, i] /= max(tied[j, i], one)
    for p in range(m):
        value, written = values[places[p] : places[p + 1]], grad[places[p] : places[p + 1]]
        for i in range(len(value)):
            written[i] = mean[i]
        for j in range(k):
            largest, part = top[j], grad_top[j]
            for i in range(len(value)):
                written[i] += part[i] if abs(value[i] - largest[i]) <= margin[i] else zero


@_compiled()
def _share(
    s: Array, places: Array, margin: Array, scan: bool, per_word: Array, per_region: Array, f: Array, g: Array,
    grad_f: Array, grad_g: Array, count_f: Array, count_g: Array,
) -> None:  # fmt: skip
    """Divides the gradient of each maximum by the number of similarities that are it or tie with it."""
    n, zero, one = places[1], s.dtype.type(0), s.dtype.type(1)
    count_f[: len(s) * n] = 0
    count_g[:] = 0
    for w in range(len(s)):
        row, words, norms = s[w], f[w * n : (w + 1) * n], per_word[w * n : (w + 1) * n]
        counts = count_f[w * n : (w + 1) * n]
        for p in range(len(places) - 1):
            first, last = places[p], places[p + 1]
            values, regions, region_counts = row[first:last], g[first:last], count_g[first:last]
            if scan:
                region_norms = per_region[first:last]
                for i in range(len(values)):
                    counts[i] += one if values[i] * region_norms[i] >= words[i] - margin[i] else zero
                    region_counts[i] += one if values[i] * norms[i] >= regions[i] - margin[i] else zero
            else:
                for i in range(len(values)):
                    counts[i] += one if values[i] >= words[i] - margin[i] else zero
                    region_counts[i] += one if values[i] >= regions[i] - margin[i] else zero
    for i in range(len(s) * n):
        grad_f[i] /= count_f[i]
    for i in range(len(g)):
        grad_g[i] /= count_g[i]


@_compiled()
def _grad(s: Array, places: Array, margin: Array, f: Array, g: Array, grad_f: Array, grad_g: Array, out: Array) -> None:
    n, zero = places[1], s.dtype.type(0)
    for w in range(len(s)):
        words, grad_words = f[w * n : (w + 1) * n], grad_f[w * n : (w + 1) * n]
        for p in range(len(places) - 1):
            first, last = places[p], places[p + 1]
            values, written, regions, grad_regions = (
                s[w, first:last],
                out[w, first:last],
                g[first:last],
                grad_g[first:last],
            )
            for i in range(len(values)):
                to_word = grad_words[i] if values[i] >= words[i] - margin[i] else zero
                to_region = grad_regions[i] if values[i] >= regions[i] - margin[i] else zero
                written[i] = to_word + to_region


@_compiled()
def _scan_grad(
    s: Array, places: Array, margin: Array, per_word: Array, per_region: Array, f: Array, g: Array,
    grad_f: Array, grad_g: Array, along_words: Array, along_regions: Array, out: Array,
) -> None:  # fmt: skip
    """d(s / ‖s‖) = (g − a <g, a>) / ‖s‖ in both directions, then LeakyReLU, whose s > 0 exactly where x > 0."""
    n, zero, slope = places[1], s.dtype.type(0), s.dtype.type(LEAKY_SLOPE)
    along_words[: len(s) * n] = 0
    along_regions[:] = 0
    for turn in range(2):
        for w in range(len(s)):
            a, b = w * n, (w + 1) * n
            words, grad_words, norms, along = f[a:b], grad_f[a:b], per_word[a:b], along_words[a:b]
            for p in range(len(places) - 1):
                first, last = places[p], places[p + 1]
                values, written, region_norms = s[w, first:last], out[w, first:last], per_region[first:last]
                regions, grad_regions, region_along = g[first:last], grad_g[first:last], along_regions[first:last]
                if turn == 0:
                    for i in range(len(values)):
                        to_word = grad_words[i] if values[i] * region_norms[i] >= words[i] - margin[i] else zero
                        to_region = grad_regions[i] if values[i] * norms[i] >= regions[i] - margin[i] else zero
                        region_along[i] += to_word * words[i]
                        along[i] += to_region * regions[i]
                else:
                    for i in range(len(values)):
                        to_word = grad_words[i] if values[i] * region_norms[i] >= words[i] - margin[i] else zero
                        to_region = grad_regions[i] if values[i] * norms[i] >= regions[i] - margin[i] else zero
                        grad_s = to_word * region_norms[i] + to_region * norms[i]
                        grad_s -= values[i] * (
                            region_along[i] * region_norms[i] * region_norms[i] + along[i] * norms[i] * norms[i]
                        )
                        written[i] = grad_s if values[i] > zero else grad_s * slope
