"""Calls that need torch's CUDA build: its allocators, streams, graphs, AMP, and a second device."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gradkernels
import torch
from gradkernels import use_backend
from gradkernels.triton import multi_tensor
from torch import Tensor

from .calls import Calls, tensors_in

CUDA = torch.device("cuda", 0)
PARAMS = ((5000,), (7, 9), (33,))
WAITS = ("synchronize", "wait")


def _params(device: torch.device = CUDA) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in PARAMS]


def _set_grads(params: list[torch.nn.Parameter]) -> list[Tensor]:
    for param in params:
        param.grad = torch.ones_like(param)
    return [param.grad for param in params if param.grad is not None]


def _loss(device: torch.device = CUDA) -> Tensor:
    x, y = torch.ones(64, 32, device=device), torch.ones(64, device=device)
    weight = torch.ones(32, device=device, requires_grad=True)
    return gradkernels.linear_mse_loss(x, weight, y)


def _field(event: str, name: str) -> str:
    """The value of a field of a recorded line."""
    return dict(field.split("=", 1) for field in event.split(" ")[1:])[name]


class CudaCalls(Calls):
    """``Calls``, and those of a device with its own memory."""

    def tables_in_flight(self) -> list[Any]:
        """Steps in a row without a wait: each kernel finds the addresses of its own step's gradients."""
        params = _params()
        optimizer = gradkernels.FusedAdamW(params, lr=0.1)
        _set_grads(params)
        with self._recorder.recording() as record:
            optimizer.step()
        torch.cuda.synchronize()
        given = tensors_in(record.asked[0][1])
        rows = next(tensor for tensor in given if tensor.shape == (3, multi_tensor.WIDTH.value))
        kept = [_set_grads(params) for _ in range(5)]
        torch.cuda.synchronize()
        self._standin.library.standin_watch(ctypes.c_void_p(rows.data_ptr()), ctypes.c_size_t(rows.nbytes))
        self._look()
        for grads in kept:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
        torch.cuda.synchronize()
        self._standin.library.standin_watch(None, ctypes.c_size_t(0))
        events = self._accepted()
        assert sum(event.startswith("launch kernel=_adam") for event in events) == len(kept)
        found = [
            torch.frombuffer(bytearray.fromhex(event.removeprefix("executed memory=")), dtype=torch.int64)
            .view(rows.shape)[:, multi_tensor.GRAD.value]
            .tolist()
            for event in events
            if event.startswith("executed")
        ]
        wanted = [[grad.data_ptr() for grad in grads] for grads in kept]
        assert found == wanted, f"{found} for {wanted}"
        return found

    def capture_step(self, name: str, options: dict[str, Any]) -> list[str]:
        """What a captured step holds."""
        params = _params()
        optimizer = getattr(gradkernels, name)(params, lr=0.1, **options)
        _set_grads(params)
        optimizer.step()
        return self._capture(optimizer.step)

    def refused_capture(self, name: str, options: dict[str, Any]) -> None:
        """A captured step that the optimizer itself must refuse, before it gives the graph any work.

        Raises:
            RuntimeError: what it raised.
        """
        params = _params()
        optimizer = getattr(gradkernels, name)(params, lr=0.1, **options)
        _set_grads(params)
        optimizer.step()
        self._look()
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()
        finally:
            assert self._captured(self._accepted()) == []

    def prohibited(self, what: str) -> list[str]:
        """The reasons with which the driver refuses a call during a capture, and the end of that capture."""
        tensor = torch.ones(4, device=CUDA)
        event = torch.cuda.Event()
        event.record()
        other = torch.cuda.Stream()
        library, pointer, page = self._standin.library, ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4096)
        calls: dict[str, Callable[[], object]] = {
            "device": torch.cuda.synchronize,
            "stream": lambda: torch.cuda.current_stream().synchronize(),
            "query": lambda: torch.cuda.current_stream().query(),
            "other stream": other.synchronize,
            "event": event.synchronize,
            "event query": event.query,
            "isolation": lambda: torch.cuda.current_stream().wait_event(event),
            "memory": lambda: library.cudaMalloc(pointer, page),
            "pinned": lambda: library.cudaHostAlloc(pointer, page, 0),
            "pageable": lambda: library.cudaMemcpyAsync(
                ctypes.c_void_p(tensor.data_ptr()), ctypes.c_char_p(b"0123"), ctypes.c_size_t(4), 1,
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ),
        }  # fmt: skip
        self._look()
        with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            calls[what]()
        assert not torch.cuda.is_current_stream_capturing()
        torch.cuda.synchronize()
        events = self._standin.events()
        return [event.removeprefix("refused ") for event in events if event.startswith("refused")]

    def capture_op(self, dtype: str) -> list[str]:
        """Forward and backward, captured after warmup alone."""
        kind = getattr(torch, dtype)
        gradkernels.warmup("linear_mse", [(64, 32), (1, 32), (64, 1), (1,)], kind, CUDA)
        x, y = torch.ones(64, 32, device=CUDA, dtype=kind), torch.ones(64, 1, device=CUDA, dtype=kind)
        weight, bias = (
            torch.ones(shape, device=CUDA, dtype=kind, requires_grad=True) for shape in ((1, 32), (1,))
        )
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        return self._capture(lambda: gradkernels.linear_mse_loss(x, weight, y, bias).backward())

    def refused_op(self) -> None:
        """A captured call of a variant that warmup has not loaded.

        Raises:
            RuntimeError: what it raised.
        """
        gradkernels.warmup("mse", [(64,), (64,)], torch.float32, CUDA)
        x, y = torch.ones(65, device=CUDA)[1:], torch.ones(64, device=CUDA)
        self._look()
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                gradkernels.mse_loss(x, y)
        finally:
            assert self._captured(self._accepted()) == []

    def scaler_step(self) -> list[str]:
        """A step by GradScaler, which hands the scale to an optimizer made with ``fused=True``."""
        params = _params()
        optimizer = gradkernels.FusedAdamW(params, lr=0.1, max_norm=1.0, fused=True)
        scaler = torch.amp.GradScaler("cuda")
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            scaler.scale(torch.stack([param.sum() for param in params]).sum()).backward()
            self._look()
            scaler.step(optimizer)
            scaler.update()
        return self._accepted()

    def waits(self) -> list[str]:
        """What the host waits for, or copies from pageable memory, in forward, backward and an unchanged step."""
        params = _params()
        optimizer = gradkernels.FusedSGD(params, lr=0.1, momentum=0.9)
        _set_grads(params)
        for _ in range(2):
            optimizer.step()
        _loss().backward()
        self._look()
        optimizer.step()
        _loss().backward()
        return [event for event in self._accepted() if event.startswith(WAITS) or "pageable" in event]

    def side_stream(self) -> list[int]:
        """Forward and backward under a stream that is current for forward alone."""
        stream = torch.cuda.Stream()
        with use_backend("triton"), self._recorder.recording() as record, torch.cuda.stream(stream):
            loss = _loss()
            loss.mul(2).backward()
        assert record.launches
        assert {launch.stream for launch in record.launches} == {stream.cuda_stream}
        return [launch.stream for launch in record.launches]

    def two_devices(self) -> list[int]:
        """Ops and one optimizer over tensors of both devices, with the first current."""
        torch.cuda.set_device(0)
        params = [*_params(CUDA), *_params(torch.device("cuda", 1))]
        _set_grads(params)
        optimizer = gradkernels.FusedAdamW(params, lr=0.1, max_norm=1.0, on_nonfinite="skip")
        with self._recorder.recording() as record:
            for device in range(2):
                _loss(torch.device("cuda", device)).backward()
            optimizer.step()
        assert torch.cuda.current_device() == 0
        return [launch.device for launch in record.launches]

    def _capture(self, work: Callable[[], object]) -> list[str]:
        """What a graph of the work holds, in order; it is replayed twice."""
        self._look()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Not torch's own: as a capture begins, torch 2.13 waits for another stream.
            began = [event for event in self._accepted() if event.startswith("capture graph=")]
            self._look()
            work()
        captured = self._captured([*began, *self._accepted()])
        self._look()
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        replays = [event for event in self._accepted() if event.startswith("replay")]
        assert [int(_field(event, "length")) for event in replays] == [len(captured)] * 2
        return captured

    @staticmethod
    def _captured(events: list[str]) -> list[str]:
        """The work recorded between the start of a capture and its end, all of it in the graph."""
        start = next(i for i, event in enumerate(events) if event.startswith("capture graph="))
        end = next(i for i, event in enumerate(events) if event.startswith("captured graph="))
        graph, within = _field(events[start], "graph"), events[start + 1 : end]
        assert not any(event.startswith(("module", *WAITS)) for event in within), within
        work = [event for event in within if " graph=" in event]
        assert {_field(event, "graph") for event in work} <= {graph}, "done at once during the capture"
        assert int(_field(events[end], "length")) == len(work)
        return work

    def _look(self) -> None:
        self._standin.events()
        self._start = len(self._standin.history)

    def _accepted(self) -> list[str]:
        """The events since the last look, none of them refused."""
        self._standin.events()
        events = self._standin.history[self._start :]
        refused = [event for event in events if event.startswith("refused")]
        assert not refused, refused
        return events
