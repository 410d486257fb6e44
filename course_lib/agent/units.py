"""Unit conversion by exact factors to SI. Source of the factors: NIST Special Publication 811 (2008), appendix B.8."""

from __future__ import annotations

from fractions import Fraction

from course_lib.agent.calculator import write_number
from course_lib.errors import did_you_mean

# quantity -> unit -> factor to the SI unit, as text; the first unit is the SI unit
_FACTORS: dict[str, dict[str, str]] = {
    "length": {
        **{"m": "1", "km": "1000", "cm": "0.01", "mm": "0.001", "um": "0.000001", "nm": "0.000000001"},
        **{"in": "0.0254", "ft": "0.3048", "yd": "0.9144", "mi": "1609.344", "nmi": "1852"},
    },
    "mass": {
        **{"kg": "1", "g": "0.001", "mg": "0.000001", "t": "1000"},
        **{"lb": "0.45359237", "oz": "0.028349523125", "st": "6.35029318", "jin": "0.5"},
    },
    "time": {"s": "1", "ms": "0.001", "min": "60", "h": "3600", "d": "86400", "week": "604800", "year": "31557600"},
    "area": {
        **{"m2": "1", "km2": "1000000", "cm2": "0.0001", "ha": "10000"},
        **{"acre": "4046.8564224", "ft2": "0.09290304", "mi2": "2589988.110336", "mu": "2000/3"},
    },
    "volume": {
        **{"m3": "1", "l": "0.001", "ml": "0.000001", "cm3": "0.000001"},
        **{"gal": "0.003785411784", "pt": "0.000473176473", "cup": "0.0002365882365", "floz": "0.0000295735295625"},
    },
    "speed": {"m/s": "1", "km/h": "5/18", "mph": "0.44704", "kn": "463/900"},
    "energy": {"J": "1", "kJ": "1000", "cal": "4.184", "kcal": "4184", "Wh": "3600", "kWh": "3600000"},
    "power": {"W": "1", "kW": "1000", "hp": "745.69987158227022"},
    "pressure": {
        "Pa": "1",
        "kPa": "1000",
        "bar": "100000",
        "atm": "101325",
        "psi": "6894.757293168",
        "mmHg": "133.322387415",
    },
    "data": {
        **{"B": "1", "bit": "1/8", "kB": "1000", "MB": "1000000", "GB": "1000000000", "TB": "1000000000000"},
        **{"KiB": "1024", "MiB": "1048576", "GiB": "1073741824", "TiB": "1099511627776"},
    },
}
# unit -> (scale, kelvins at its zero)
_TEMPERATURES = {
    "K": (Fraction(1), Fraction(0)),
    "C": (Fraction(1), Fraction("273.15")),
    "F": (Fraction(5, 9), Fraction("273.15") - Fraction(160, 9)),
}
_NAMES: dict[str, str] = {
    **{"meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "centimeter": "cm", "centimetre": "cm"},
    **{
        "millimeter": "mm",
        "millimetre": "mm",
        "inch": "in",
        "inches": "in",
        "foot": "ft",
        "feet": "ft",
        "yard": "yd",
        "mile": "mi",
    },
    **{
        "nautical mile": "nmi",
        "kilogram": "kg",
        "gram": "g",
        "milligram": "mg",
        "tonne": "t",
        "ton": "t",
        "pound": "lb",
        "lbs": "lb",
    },
    **{
        "ounce": "oz",
        "stone": "st",
        "second": "s",
        "sec": "s",
        "minute": "min",
        "hour": "h",
        "hr": "h",
        "day": "d",
        "yr": "year",
    },
    **{
        "hectare": "ha",
        "square meter": "m2",
        "square metre": "m2",
        "square foot": "ft2",
        "square feet": "ft2",
        "sqft": "ft2",
    },
    **{
        "square kilometer": "km2",
        "square kilometre": "km2",
        "square mile": "mi2",
        "liter": "l",
        "litre": "l",
        "milliliter": "ml",
    },
    **{
        "millilitre": "ml",
        "gallon": "gal",
        "pint": "pt",
        "fluid ounce": "floz",
        "fl oz": "floz",
        "kmh": "km/h",
        "kph": "km/h",
    },
    **{"knot": "kn", "joule": "J", "calorie": "cal", "watt": "W", "horsepower": "hp", "pascal": "Pa", "byte": "B"},
    **{"celsius": "C", "°c": "C", "degc": "C", "fahrenheit": "F", "°f": "F", "degf": "F", "kelvin": "K"},
    **{
        "米": "m",
        "公里": "km",
        "千米": "km",
        "厘米": "cm",
        "毫米": "mm",
        "英寸": "in",
        "英尺": "ft",
        "码": "yd",
        "英里": "mi",
    },
    **{
        "海里": "nmi",
        "公斤": "kg",
        "千克": "kg",
        "克": "g",
        "毫克": "mg",
        "吨": "t",
        "磅": "lb",
        "盎司": "oz",
        "斤": "jin",
    },
    **{
        "秒": "s",
        "分钟": "min",
        "小时": "h",
        "天": "d",
        "周": "week",
        "年": "year",
        "平方米": "m2",
        "平方公里": "km2",
        "公顷": "ha",
    },
    **{"亩": "mu", "英亩": "acre", "升": "l", "毫升": "ml", "加仑": "gal", "摄氏度": "C", "华氏度": "F", "开尔文": "K"},
}
_QUANTITY = {unit: quantity for quantity, units in _FACTORS.items() for unit in units} | dict.fromkeys(
    _TEMPERATURES, "temperature"
)


def convert(value: float, from_unit: str, to_unit: str) -> str:
    """The value in the other unit with both units' signs, as in "26.2 mi = 42.1648128 km".

    Raises:
        ValueError: an unknown unit, units of different quantities, or no finite number.
    """
    source, target = _unit(from_unit), _unit(to_unit)
    if _QUANTITY[source] != _QUANTITY[target]:
        raise ValueError(f"{source} is a unit of {_QUANTITY[source]} and {target} one of {_QUANTITY[target]}")
    try:
        exact = Fraction(str(value))
    except ValueError:
        raise ValueError(f"{value} is not a finite number") from None
    if source in _TEMPERATURES:
        (scale, zero), (other_scale, other_zero) = _TEMPERATURES[source], _TEMPERATURES[target]
        result = (exact * scale + zero - other_zero) / other_scale
    else:
        units = _FACTORS[_QUANTITY[source]]
        result = exact * Fraction(units[source]) / Fraction(units[target])
    return f"{write_number(exact)} {source} = {_ten_digits(result)} {target}"


def _ten_digits(value: Fraction) -> str:
    return write_number(Fraction(f"{float(value):.10g}"))


def _unit(name: str) -> str:
    name = name.strip().replace("²", "2").replace("³", "3").replace("^", "")
    if name in _QUANTITY:
        return name
    lower = name.lower().replace("_", " ").removeprefix("degrees ").removeprefix("degree ")
    for known in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if known in _NAMES:
            return _NAMES[known]
        if fits := [unit for unit in _QUANTITY if unit.lower() == known]:
            return fits[0]
    known = {*_QUANTITY, *_NAMES}
    raise ValueError(
        f"the unit {name[:40]!r} is unknown{did_you_mean(name[:40], known)}; known: {', '.join(_QUANTITY)}"
    )
