"""A client of OpenAI-style servers, for teachers and rollouts alike; it knows of neither.

`client.py` asks again and decides when that is of no use, `transport.py` makes one request,
`answers.py` reads what came back, and `keys.py` keeps the key out of sight.
"""

from stableopd.endpoint.answers import AnswerError, answer_bytes, at, listed, number, table, words
from stableopd.endpoint.client import Endpoint, RefusedError, root_of
from stableopd.endpoint.keys import read_key

__all__ = [
    "AnswerError",
    "Endpoint",
    "RefusedError",
    "answer_bytes",
    "at",
    "listed",
    "number",
    "read_key",
    "root_of",
    "table",
    "words",
]
