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

import numpy as np

from hrem_layers.alignment.block import LEAKY_SLOPE
from hrem_layers.alignment.cpu.arguments import Array, ImageColumns, ScoreArrays, TextRows
from hrem_layers.alignment.cpu.compiling import compiled, larger, smaller


@compiled()
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
            _scan_maxima(s, places, per_word, per_region, f, g)
        else:
            _maxima(s, places, f, g)
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


@compiled()
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
            _scan_maxima(x, places, per_word, per_region, f, g)
        else:
            _maxima(x, places, f, g)
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
        _lower(f, word_places[: w + 1], margin)
        _lower(g, places, margin)
        if scan:
            _scan_share(x, places, per_word, per_region, f, g, grad_f, grad_g, spare_g)
            _scan_grad(x, places, per_word, per_region, f, g, grad_f, grad_g, spare_f, spare_g, grad)
        else:
            _share(x, places, f, g, grad_f, grad_g, spare_g)
            _grad(x, places, f, g, grad_f, grad_g, grad)


@compiled()
def _places_at_once(places: Array) -> int:
    """How many places a loop goes over, for which a word's values are repeated: one if an image has fewer regions than
    another, else as many as make the loop long enough for vector instructions."""
    n, m = places[1], len(places) - 1
    return min(m, max(1, 128 // n)) if places[m] == m * n else 1


@compiled()
def _repeat(values: Array, out: Array) -> None:
    n = len(values)
    for start in range(0, len(out), n):
        part = out[start : start + n]
        for i in range(n):
            part[i] = values[i]


@compiled()
def _add_up(repeated: Array, out: Array) -> None:
    """Adds all repetitions to ``out``."""
    n = len(out)
    for start in range(0, len(repeated), n):
        part = repeated[start : start + n]
        for i in range(n):
            out[i] += part[i]


@compiled()
def _divide(values: Array, repeated: Array) -> None:
    """By the sum of all repetitions, of which the first becomes that sum."""
    n = len(values)
    for start in range(n, len(repeated), n):
        _add_up(repeated[start : start + n], repeated[:n])
    for i in range(n):
        values[i] /= repeated[i]


@compiled()
def _norms(s: Array, places: Array, least: float, per_word: Array, per_region: Array) -> None:
    """1 / ‖s‖ of each word over the regions of each image, and of each region over the words; 0 for a square below
    ``least``."""
    n, m, step, zero, one = places[1], len(places) - 1, _places_at_once(places), s.dtype.type(0), s.dtype.type(1)
    wide = np.empty(step * n, s.dtype)
    per_word[: len(s) * n] = 0
    per_region[:] = 0
    for w in range(len(s)):
        row = s[w, : places[m]]
        for i in range(len(row)):
            per_region[i] += row[i] * row[i]
        wide[:] = 0
        for p in range(0, m, step):
            values = row[places[p] : places[min(p + step, m)]]
            for i in range(len(values)):
                wide[i] += values[i] * values[i]
        _add_up(wide, per_word[w * n : (w + 1) * n])
    for i in range(len(s) * n):
        per_word[i] = one / np.sqrt(per_word[i]) if per_word[i] > least else zero
    for i in range(len(per_region)):
        per_region[i] = one / np.sqrt(per_region[i]) if per_region[i] > least else zero


@compiled()
def _maxima(s: Array, places: Array, f: Array, g: Array) -> None:
    """Writes the largest similarity of each word with a region of each image to ``f``, of each region with a word to
    ``g``."""
    n, m = places[1], len(places) - 1
    f[: len(s) * n] = -np.inf
    g[:] = -np.inf
    # Where all images have m regions, four strips of places are folded into one first, in one long loop.
    strip = m // 4 if places[m] == m * n else 0
    folded, size = np.empty(strip * n, s.dtype), strip * n
    for w in range(len(s)):
        row, words = s[w, : places[m]], f[w * n : (w + 1) * n]
        for i in range(len(row)):
            g[i] = larger(row[i], g[i])
        for i in range(len(folded)):
            folded[i] = larger(
                larger(row[i], row[size + i]),
                larger(row[2 * size + i], row[3 * size + i]),
            )
        for p in range(strip):
            values = folded[p * n : (p + 1) * n]
            for i in range(len(values)):
                words[i] = larger(values[i], words[i])
        for p in range(4 * strip, m):
            values = row[places[p] : places[p + 1]]
            for i in range(len(values)):
                words[i] = larger(values[i], words[i])


@compiled()
def _scan_maxima(s: Array, places: Array, per_word: Array, per_region: Array, f: Array, g: Array) -> None:
    """:func:`_maxima` of s / ‖s‖."""
    n, m, step = places[1], len(places) - 1, _places_at_once(places)
    wide, norms = np.empty(step * n, s.dtype), np.empty(step * n, s.dtype)
    f[: len(s) * n] = -np.inf
    g[:] = -np.inf
    for w in range(len(s)):
        _repeat(per_word[w * n : (w + 1) * n], norms)
        wide[:] = -np.inf
        for p in range(0, m, step):
            first, last = places[p], places[min(p + step, m)]
            values, regions, region_norms = s[w, first:last], g[first:last], per_region[first:last]
            for i in range(len(values)):
                regions[i] = larger(values[i] * norms[i], regions[i])
            for i in range(len(values)):
                wide[i] = larger(values[i] * region_norms[i], wide[i])
        words = f[w * n : (w + 1) * n]
        for start in range(0, len(wide), n):
            part = wide[start : start + n]
            for i in range(n):
                words[i] = larger(part[i], words[i])


@compiled()
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
                stays[i] = larger(x, y)
                falling[i] = smaller(x, y)


@compiled()
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


@compiled()
def _lower(values: Array, places: Array, margin: Array) -> None:
    """Makes of each maximum the least value that ties with it."""
    for p in range(len(places) - 1):
        value = values[places[p] : places[p + 1]]
        for i in range(len(value)):
            value[i] -= margin[i]


@compiled()
def _share(s: Array, places: Array, f: Array, g: Array, grad_f: Array, grad_g: Array, count_g: Array) -> None:
    """Divides the gradient of each maximum by the number of similarities that are it or tie with it: that are at least
    ``f`` or ``g``."""
    n, m, step = places[1], len(places) - 1, _places_at_once(places)
    zero, one = s.dtype.type(0), s.dtype.type(1)
    least, count = np.empty(n * step, s.dtype), np.empty(n * step, s.dtype)
    count_g[:] = 0
    for w in range(len(s)):
        row, grad_words = s[w, : places[m]], grad_f[w * n : (w + 1) * n]
        for i in range(len(row)):
            count_g[i] += one if row[i] >= g[i] else zero
        _repeat(f[w * n : (w + 1) * n], least)
        count[:] = 0
        for p in range(0, m, step):
            values = row[places[p] : places[min(p + step, m)]]
            for i in range(len(values)):
                count[i] += one if values[i] >= least[i] else zero
        _divide(grad_words, count)
    _divide(grad_g, count_g)


@compiled()
def _scan_share(
    s: Array, places: Array, per_word: Array, per_region: Array, f: Array, g: Array, grad_f: Array, grad_g: Array,
    count_g: Array,
) -> None:  # fmt: skip
    """:func:`_share` with the maxima of s / ‖s‖."""
    n, m, step = places[1], len(places) - 1, _places_at_once(places)
    zero, one = s.dtype.type(0), s.dtype.type(1)
    least, count = np.empty(n * step, s.dtype), np.empty(n * step, s.dtype)
    norms = np.empty(n * step, s.dtype)
    count_g[:] = 0
    for w in range(len(s)):
        a, b = w * n, (w + 1) * n
        grad_words = grad_f[a:b]
        _repeat(f[a:b], least)
        _repeat(per_word[a:b], norms)
        count[:] = 0
        for p in range(0, m, step):
            first, last = places[p], places[min(p + step, m)]
            values, norms_here, regions, region_counts = (
                s[w, first:last],
                per_region[first:last],
                g[first:last],
                count_g[first:last],
            )
            for i in range(len(values)):
                count[i] += one if values[i] * norms_here[i] >= least[i] else zero
            for i in range(len(values)):
                region_counts[i] += one if values[i] * norms[i] >= regions[i] else zero
        _divide(grad_words, count)
    _divide(grad_g, count_g)


@compiled()
def _grad(s: Array, places: Array, f: Array, g: Array, grad_f: Array, grad_g: Array, out: Array) -> None:
    n, m, step, zero = places[1], len(places) - 1, _places_at_once(places), s.dtype.type(0)
    least, grad_words = np.empty(n * step, s.dtype), np.empty(n * step, s.dtype)
    for w in range(len(s)):
        _repeat(f[w * n : (w + 1) * n], least)
        _repeat(grad_f[w * n : (w + 1) * n], grad_words)
        for p in range(0, m, step):
            first, last = places[p], places[min(p + step, m)]
            values, written, regions, grad_regions = (
                s[w, first:last],
                out[w, first:last],
                g[first:last],
                grad_g[first:last],
            )
            for i in range(len(values)):
                to_word = grad_words[i] if values[i] >= least[i] else zero
                to_region = grad_regions[i] if values[i] >= regions[i] else zero
                written[i] = to_word + to_region


@compiled()
def _scan_grad(
    s: Array, places: Array, per_word: Array, per_region: Array, f: Array, g: Array, grad_f: Array, grad_g: Array,
    along_words: Array, along_regions: Array, out: Array,
) -> None:  # fmt: skip
    """d(s / ‖s‖) = (g − a <g, a>) / ‖s‖ in both directions, then LeakyReLU, whose s > 0 exactly where x > 0."""
    n, m, step = places[1], len(places) - 1, _places_at_once(places)
    zero, slope = s.dtype.type(0), s.dtype.type(LEAKY_SLOPE)
    least, grad_words, norms = np.empty(n * step, s.dtype), np.empty(n * step, s.dtype), np.empty(n * step, s.dtype)
    along = np.empty(n * step, s.dtype)
    along_words[: len(s) * n] = 0
    along_regions[:] = 0
    for w in range(len(s)):  # g / ‖s‖ and <g, a>
        a, b = w * n, (w + 1) * n
        _repeat(f[a:b], least)
        _repeat(grad_f[a:b], grad_words)
        _repeat(per_word[a:b], norms)
        along[:] = 0
        for p in range(0, m, step):
            first, last = places[p], places[min(p + step, m)]
            values, written, norms_here = s[w, first:last], out[w, first:last], per_region[first:last]
            regions, grad_regions, along_here = g[first:last], grad_g[first:last], along_regions[first:last]
            for i in range(len(values)):
                x = values[i] * norms_here[i]
                to_word = grad_words[i] if x >= least[i] else zero
                along_here[i] += to_word * x
                written[i] = to_word * norms_here[i]
            for i in range(len(values)):
                x = values[i] * norms[i]
                to_region = grad_regions[i] if x >= regions[i] else zero
                along[i] += to_region * x
                written[i] += to_region * norms[i]
        _add_up(along, along_words[a:b])
    for i in range(len(s) * n):
        along_words[i] *= per_word[i] * per_word[i]
    for i in range(len(g)):
        along_regions[i] *= per_region[i] * per_region[i]
    for w in range(len(s)):
        _repeat(along_words[w * n : (w + 1) * n], along)
        for p in range(0, m, step):
            first, last = places[p], places[min(p + step, m)]
            values, written, along_here = s[w, first:last], out[w, first:last], along_regions[first:last]
            for i in range(len(values)):
                grad_s = written[i] - values[i] * (along[i] + along_here[i])
                written[i] = grad_s if values[i] > zero else grad_s * slope
