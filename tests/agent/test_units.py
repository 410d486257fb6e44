from __future__ import annotations

import pytest

from course_lib.agent.units import convert


@pytest.mark.parametrize(
    ("value", "source", "target", "result"),
    [
        (26.2, "miles", "km", "26.2 mi = 42.1648128 km"),
        (100, "celsius", "fahrenheit", "100 C = 212 F"),
        (-40, "°F", "°C", "-40 F = -40 C"),
        (0, "K", "摄氏度", "0 K = -273.15 C"),
        (1, "GiB", "MB", "1 GiB = 1073.741824 MB"),
        (36, "km/h", "m/s", "36 km/h = 10 m/s"),
        (3, "亩", "平方米", "3 mu = 2000 m2"),
        (6, "feet", "Centimetres", "6 ft = 182.88 cm"),
        (1, "m²", "ft^2", "1 m2 = 10.76391042 ft2"),
        (1e-7, "kWh", "J", "1e-7 kWh = 0.36 J"),
        (2, "mb", "KIB", "2 MB = 1953.125 KiB"),
    ],
)
def test_conversions(value: float, source: str, target: str, result: str) -> None:
    assert convert(value, source, target) == result


@pytest.mark.parametrize(
    ("value", "source", "target", "says"),
    [
        (1, "kilometr", "m", "'kilometr' is unknown; did you mean kilometre"),
        (1, "kg", "m", "kg is a unit of mass and m one of length"),
        (float("nan"), "m", "km", "not a finite number"),
        (float("inf"), "C", "F", "not a finite number"),
        (1, "x" * 10_000, "m", "is unknown"),
        (1, "", "m", "is unknown"),
    ],
)
def test_what_cannot_be_converted_is_told(value: float, source: str, target: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        convert(value, source, target)
    assert len(str(caught.value)) < 500
