"""What the papers report: mean test errors of 5 repetitions, recomputed from the result files that the authors give."""

from lmmnn.data import Setting

_COLUMNS = ("ignore", "one-hot", "embedding", "lme4", "LMMNN")
_ONE_FACTOR = {
    (100, 0.1): (1.239, 1.182, 1.156, 2.927, 1.096),
    (100, 1.0): (2.094, 1.234, 1.179, 2.930, 1.096),
    (100, 10.0): (10.753, 1.551, 1.551, 2.930, 1.106),
    (1000, 0.1): (1.222, 1.277, 1.215, 2.931, 1.094),
    (1000, 1.0): (2.147, 1.361, 1.278, 2.937, 1.103),
    (1000, 10.0): (11.047, 1.597, 1.647, 2.934, 1.088),
    (10000, 0.1): (1.220, 1.565, 1.584, 2.961, 1.180),
    (10000, 1.0): (2.152, 1.701, 1.665, 3.221, 1.238),
    (10000, 10.0): (11.235, 2.370, 2.119, 3.324, 1.294),
}
_TWO_FACTORS = (11.240, 3.019, 2.550, 3.694, 1.485)
_LONGITUDINAL = {  # without lme4, whose numbers are those of a linear model in x
    (0.3, 0.3, 0.3): (1.472, 1.612, 1.630, None, 1.235),
    (0.3, 0.3, 3.0): (1.514, 1.634, 1.644, None, 1.225),
    (3.0, 0.3, 0.3): (4.288, 1.874, 1.801, None, 1.291),
    (3.0, 3.0, 3.0): (4.721, 1.958, 1.884, None, 1.287),
}

ERRORS = {
    Setting(levels, sigma2, time=time): dict(zip(_COLUMNS, errors, strict=True))
    for levels, sigma2, time, errors in [
        *(((q,), (v,), None, errors) for (q, v), errors in _ONE_FACTOR.items()),
        ((10000, 10000), (5.0, 5.0), None, _TWO_FACTORS),
        *(((10000,), sigma2, "longest", errors) for sigma2, errors in _LONGITUDINAL.items()),
    ]
}
"""Test errors by setting and method."""

VARIANCES = {
    Setting((10000,), (0.3, 0.3, 0.3), time="longest"): (0.308, 0.469, 0.326),
    Setting((10000,), (0.3, 0.3, 3.0), time="longest"): (0.314, 0.757, 2.165),
    Setting((10000,), (3.0, 0.3, 0.3), time="longest"): (3.006, 0.345, 0.565),
    Setting((10000,), (3.0, 3.0, 3.0), time="longest"): (3.038, 3.022, 3.445),
}
"""LMMNN's variances of intercept, slope and quadratic term."""
