"What the tests of all sources ask of a refusal: the right type, one line, the words that help."
import pytest

from cromss.config import DataError
from cromss.sources import SkipLocation


def refused(call, *words, error=DataError):
    "The message of a data set that is refused as a whole."
    with pytest.raises(error) as e: call()
    assert not isinstance(e.value, SkipLocation), e.value
    text = str(e.value)
    assert "\n" not in text and all(w in text for w in words), text
    return text


def skipped(call, reason, *words):
    "The message of a place that is left out."
    with pytest.raises(SkipLocation) as e: call()
    assert e.value.reason == reason and "\n" not in str(e.value) and all(w in str(e.value) for w in words), e.value
    return str(e.value)
