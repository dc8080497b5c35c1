"""What dkf_pool and dkf_bn_pool say about arguments they cannot use."""

import pytest
import torch

from shike_fast.ops import dkf_bn_pool, dkf_pool

MAP = torch.zeros(2, 3, 4, 5)
VECTOR = torch.ones(3)
_FLOATS = "float16, bfloat16, float32 or float64"


def bn_pool(deep=MAP, shallow=MAP, weight=VECTOR, bias=VECTOR, mean=VECTOR, var=VECTOR, **options):
    return dkf_bn_pool(
        deep, shallow, weight, bias, mean.clone() if type(mean) is torch.Tensor else mean, var, **options
    )


BAD_MAPS = {
    "deep not a tensor": (None, MAP, TypeError, "deep must be a tensor [B, C, H, W] or [B, N, C], got NoneType"),
    "integer": (MAP, MAP.int(), TypeError, f"shallow must be {_FLOATS}, got int32 [2, 3, 4, 5]"),
    "two dimensions": (VECTOR[None], MAP, ValueError, "deep must be [B, C, H, W] or [B, N, C], got float32 [1, 3]"),
    "tokens and a map": (MAP[0], MAP, ValueError, "shallow must be [3, 4, 5] as deep, got float32 [2, 3, 4, 5]"),
    "no token": (MAP[0, :, :0], MAP[0, :, :0], ValueError, "deep must have N, C >= 1, got float32 [3, 0, 5]"),
    "shapes differ": (MAP, MAP[..., :1], ValueError, "shallow must be [2, 3, 4, 5] as deep, got float32 [2, 3, 4, 1]"),
    "no position": (MAP[:, :, :0], MAP[:, :, :0], ValueError, "deep must have C, H, W >= 1, got float32 [2, 3, 0, 5]"),
    "devices differ": (
        MAP,
        MAP.to("meta"),
        ValueError,
        "shallow must be on cpu as deep, got float32 [2, 3, 4, 5] on meta",
    ),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_maps(case):
    deep, shallow, error, message = BAD_MAPS[case]
    with pytest.raises(error) as caught:
        dkf_pool(deep, shallow)
    assert str(caught.value) == f"dkf_pool: {message}"
    with pytest.raises(error) as caught:
        bn_pool(deep, shallow, training=True)
    assert str(caught.value) == f"dkf_bn_pool: {message}"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": [1.0] * 3}, TypeError, "weight must be None or a tensor [C=3], got list"),
        ({"bias": torch.ones(4)}, ValueError, "bias must be [C=3], got float32 [4]"),
        ({"mean": torch.ones(1, 3)}, ValueError, "running_mean must be [C=3], got float32 [1, 3]"),
        ({"var": torch.ones(3).int()}, TypeError, f"running_var must be {_FLOATS}, got int32 [3]"),
        ({"weight": VECTOR.to("meta")}, ValueError, "weight must be on cpu as deep, got float32 [3] on meta"),
        (
            {"mean": None},
            ValueError,
            "running_mean and running_var must both be given or both be None, got no running_mean",
        ),
        (
            {"var": None},
            ValueError,
            "running_mean and running_var must both be given or both be None, got no running_var",
        ),
        (
            {"mean": None, "var": None, "training": False},
            ValueError,
            "running_mean and running_var must be given when training=False, got None",
        ),
        ({"momentum": None}, TypeError, "momentum must be a number, got NoneType"),
        ({"momentum": float("nan")}, ValueError, "momentum must be finite, got nan"),
        ({"eps": 0}, ValueError, "eps must be > 0, got 0.0"),
        ({"eps": float("inf")}, ValueError, "eps must be finite, got inf"),
        (
            {"backend": "mps"},
            ValueError,
            "backend must be None or one of 'reference', 'cpu', 'triton', 'cuda', got 'mps'",
        ),
    ],
)
def test_bn_pool(options, error, message):
    with pytest.raises(error) as caught:
        bn_pool(**{"training": True, **options})
    assert str(caught.value) == f"dkf_bn_pool: {message}"


def test_a_missing_backend_says_why():
    for call in (lambda: dkf_pool(MAP, MAP, backend="cuda"), lambda: bn_pool(training=True, backend="cuda")):
        with pytest.raises(RuntimeError, match=r"^dkf_(bn_)?pool: backend 'cuda' cannot run: "):
            call()
