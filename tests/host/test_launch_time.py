"""The Python that each launch costs, timed: apart from the ordinary run, whose machine is busy."""

import pytest

pytest.importorskip("triton")

from ..launch.test_launch import run

pytestmark = pytest.mark.full


def test_half_the_time_of_tritons_own_launch(tmp_path):
    """The best of several runs of each, alternating, in one process."""
    ours, triton_own = run(
        """
        import timeit
        x = torch.zeros(64)
        driver.launcher_cls = lambda source, metadata: lambda *args: None
        def ours(): launch(kernel, (1,), x, x, 5, 6, 0.5, (), device=CPU, BLOCK=16, num_warps=4)
        def own(): kernel[(1,)](x, x, 5, 6, 0.5, (), BLOCK=16, num_warps=4, enable_fp_fusion=True)
        ours(), own()
        pairs = [[timeit.timeit(f, number=500) for f in (ours, own)] for _ in range(15)]
        print(json.dumps([min(column) for column in zip(*pairs)]))
        """,
        tmp_path,
    )
    assert ours < 0.6 * triton_own, f"{ours / 500 * 1e6:.2f} us against {triton_own / 500 * 1e6:.2f} us"
