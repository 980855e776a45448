"""On a GPU: the kernel against cuBLAS, batched PyTorch and a loop over captions; exactness, memory, no waiting."""

from __future__ import annotations

import argparse

import torch
from _baselines import per_caption
from _common import RELEASE, bare_matmul, make_batch, ratio_table, section, summarize, table

from hrem_layers import AssociationGraph, HREMLoss, align_fragments
from hrem_layers.alignment import op
from hrem_layers.alignment.gpu.launch import kernel_applies

TITLE = "The kernels on a GPU"


def time_on_gpu(variants, repeats):
    """As time_in_turn, with the device's own clock."""
    for run in variants.values():
        for _ in range(3):
            run()
    seconds = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            seconds[name].append(start.elapsed_time(stop) / 1e3)
    return {name: summarize(values) for name, values in seconds.items()}


def without_kernel(run):
    """``run`` with the batched PyTorch form in the kernel's place."""

    def wrapped():
        applies, op.kernel_applies = op.kernel_applies, lambda *_: False
        try:
            return run()
        finally:
            op.kernel_applies = applies

    return wrapped


def on_device(batch, dtype):
    return type(batch)(*(x.cuda() if x.dtype == torch.bool else x.to("cuda", dtype) for x in batch))


def peak_mb(run):
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def errors(dtype):
    """The kernel's largest error in values and gradients against float64 on the CPU, relative to the largest number."""
    batch = make_batch(32, 36, 1, 24, 256)
    r, c = batch.image_fragments.to(dtype), batch.text_fragments.to(dtype)
    results = []
    for convert in (lambda x: x.cuda(), lambda x: x.double()):
        images, texts = convert(r).requires_grad_(), convert(c).requires_grad_()
        scores = align_fragments(images, texts, None, batch.text_mask.to(images.device))
        sum(x.square().sum() for x in scores).backward()
        results.append([x.detach().cpu().double() for x in (*scores, images.grad, texts.grad)])
    relative = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(*results, strict=True)]
    return f"{max(relative[:4]):.1e}", f"{max(relative[4:]):.1e}"


def no_waiting(dtype) -> str:
    """Whether a training step runs without a wait, and in a captured graph."""
    batch = on_device(make_batch(**RELEASE), torch.float32)
    loss = HREMLoss(RELEASE["dim"], graph=AssociationGraph(detach_fragments=False)).cuda()
    inputs = [x.requires_grad_() for x in batch[:4]]

    def step():
        with torch.autocast("cuda", dtype=dtype):
            total = loss(*inputs, None, batch.text_mask)
        total.backward()
        return total

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    graph.replay()
    torch.cuda.synchronize()
    return f'a step runs under `set_sync_debug_mode("error")` and in a captured graph (loss {float(total):.4g})'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        section(
            TITLE,
            "**Not measured: there was no GPU at hand.** On the CPU the kernels are checked against float64 in "
            "Triton's interpreter, and they compile to machine code for compute capabilities 8.0 and 9.0; their speed, "
            "their rounding in bfloat16, the absence of host synchronisation and the capture in a CUDA graph "
            "have not been seen on hardware yet. This script measures all of it.",
        )
        return
    paragraphs = []
    for dtype in (torch.bfloat16, torch.float32):
        batch = on_device(make_batch(**RELEASE), dtype)
        images, texts, mask = batch.image_fragments, batch.text_fragments, batch.text_mask
        assert kernel_applies(images, texts, dtype), "the kernel does not apply here"
        lengths = mask.sum(dim=1).tolist()

        def step(images=images, texts=texts, mask=mask):
            r, c = images.detach().requires_grad_(), texts.detach().requires_grad_()
            sum(x.square().sum() for x in align_fragments(r, c, None, mask)).backward()

        def forward(images=images, texts=texts, mask=mask):
            return align_fragments(images, texts, None, mask)

        with torch.no_grad():
            timings = time_on_gpu(
                {
                    "cuBLAS": bare_matmul(batch),
                    "kernel": forward,
                    "batched PyTorch": without_kernel(forward),
                    "loop over captions": lambda i=images, t=texts, n=lengths: per_caption(i, t, n),
                },
                arguments.repeats,
            )
        both = time_on_gpu(
            {"cuBLAS": bare_matmul(batch), "kernel": step, "batched PyTorch": without_kernel(step)}, arguments.repeats
        )
        paragraphs += [
            f"{str(dtype).removeprefix('torch.')}, forward:", ratio_table(timings, "cuBLAS"),
            "Forward and backward:", ratio_table(both, "cuBLAS"),
        ]  # fmt: skip
    rows = []
    for n, r, w in ((128, 36, 24), (128, 72, 24), (128, 36, 48), (512, 36, 24)):
        batch = on_device(make_batch(n, r, w, w, 256), torch.bfloat16)

        def step(batch=batch):
            images, texts = batch.image_fragments.detach(), batch.text_fragments.detach()
            total = sum(x.square().sum() for x in align_fragments(images.requires_grad_(), texts.requires_grad_()))
            total.backward()

        rows.append([f"N = {n}, R = {r}, W = {w}", f"{peak_mb(step):.0f}", f"{peak_mb(without_kernel(step)):.0f}"])
    exact = [[str(d).removeprefix("torch."), *errors(d)] for d in (torch.float32, torch.float16, torch.bfloat16)]
    section(
        TITLE,
        f"{torch.cuda.get_device_name()}. The release's sizes, as above; *cuBLAS* multiplies the real words by the "
        "regions.",
        *paragraphs,
        "Peak memory of forward and backward in MB, D = 256, bfloat16:",
        table(["", "kernel", "batched PyTorch"], rows),
        "Largest error against float64, relative to the largest number:",
        table(["", "values", "gradients"], exact),
        no_waiting(torch.bfloat16) + ".",
    )


if __name__ == "__main__":
    main()
