"""Which samples of a source enter the stream: an expression over the fields of the index, `height >= 256 and aesthetic > 5`.

The expression is parsed, checked and walked; nothing of it is executed as Python. Knows nothing of sources or plans.
"""

import ast
import difflib
import io
import operator
import tokenize
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.index import Entry

_FACTS = ("kind", "frames", "height", "width", "fps")
FIELDS = (*_FACTS, "caption_length")
"""Fields that every sample has; a sample's `meta` adds its own, nested ones by dotted names."""
_MAX_CHARACTERS = 1000
_CLASS = "\N{FULLWIDTH LATIN SMALL LETTER C}lass"

Value = Any
Evaluate = Callable[[Mapping[str, Value]], Value]

_COMPARE: dict[type[ast.cmpop], Callable[[Value, Value], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.In: lambda item, items: item in items, ast.NotIn: lambda item, items: item not in items,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Mod: operator.mod,
}  # fmt: skip


class _Missing(Exception):
    """A sample lacks a field that the expression asks for."""


def fields_of(entry: Entry) -> dict[str, Value]:
    """What a filter sees of a sample."""
    facts = {name: getattr(entry.facts, name) for name in _FACTS}
    return dict(_flat(entry.meta, "")) | facts | {"caption_length": entry.caption_length}


@dataclass(frozen=True)
class Filter:
    """The conditions of a filter, all of which a sample must meet: text and evaluator of each. names: fields they ask for."""

    text: str
    key: str
    conditions: tuple[tuple[str, Evaluate], ...]
    names: frozenset[str]

    @classmethod
    def parse(cls, text: str, key: str) -> "Filter":
        """Parse the expression `text` of the config key `key`. Raises UserError for what is no such expression."""
        try:
            if len(text) > _MAX_CHARACTERS:
                raise SyntaxError(f"longer than {_MAX_CHARACTERS} characters")
            body = ast.parse(_parseable(text.strip()), mode="eval").body
            parts = body.values if isinstance(body, ast.BoolOp) and isinstance(body.op, ast.And) else [body]
            names: set[str] = set()
            return cls(text, key, tuple((ast.unparse(part), _evaluator(part, names)) for part in parts), frozenset(names))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise UserError(
                f"{key} = {text!r}: {reason}; expected comparisons of fields and values joined by and, or, not, "
                "for example: height >= 256 and caption_length > 0"
            ) from None

    def check_names(self, known: Iterable[str]) -> None:
        """Raise UserError for a field that no sample has; `known` are those that some has."""
        everything = sorted({*FIELDS, *known})
        for name in sorted(self.names - set(everything)):
            close = difflib.get_close_matches(name, everything, n=1, cutoff=0.55)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"{self.key} = {self.text!r}: no sample has a field {name}{hint}. Fields here: {', '.join(everything)}")

    def refuses(self, entry: Entry) -> str | None:
        """Why a sample is left out, None if it is not. Raises UserError where values cannot be compared."""
        fields = fields_of(entry)
        for text, evaluate in self.conditions:
            try:
                if not evaluate(fields):
                    return f"not {text}"
            except _Missing as missing:
                return f"no {missing} for {text}"
            except (TypeError, ZeroDivisionError) as error:
                raise UserError(f"{self.key} = {self.text!r}: {text} cannot be decided for sample {entry.key}: {error}") from None
        return None


def _parseable(text: str) -> str:
    """The expression with another spelling of its fields `class`, a keyword of Python, which the parser takes and turns back: it tells
    keywords before it normalises names (NFKC). Strings stay as they are.
    """
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except tokenize.TokenError:  # the parser says better what is wrong
        return text
    return tokenize.untokenize(token._replace(string=_CLASS) if token[:2] == (tokenize.NAME, "class") else token for token in tokens)


def _flat(meta: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Value]]:
    for name, value in meta.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _evaluator(node: ast.expr, names: set[str]) -> Evaluate:
    """The function that `node` stands for; the fields it asks for are added to `names`. Raises SyntaxError for any other Python."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return lambda fields: value
        case ast.Name() | ast.Attribute():
            name = ast.unparse(node)
            if not all(part.isidentifier() for part in name.split(".")):
                raise SyntaxError(f"{name} is no field")
            names.add(name)
            return lambda fields: _field(fields, name)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            parts = [_evaluator(item, names) for item in items]
            return lambda fields: [part(fields) for part in parts]
        case ast.BoolOp(op=op, values=values):
            parts = [_evaluator(value, names) for value in values]
            decide = all if isinstance(op, ast.And) else any
            return lambda fields: decide(part(fields) for part in parts)
        case ast.UnaryOp(op=ast.Not() | ast.USub() as op, operand=operand):
            part, apply = _evaluator(operand, names), operator.not_ if isinstance(op, ast.Not) else operator.neg
            return lambda fields: apply(part(fields))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            a, b, combine = _evaluator(left, names), _evaluator(right, names), _ARITHMETIC[type(op)]
            return lambda fields: combine(a(fields), b(fields))
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            terms, tests = [_evaluator(term, names) for term in (left, *others)], [_COMPARE[type(op)] for op in ops]
            return lambda fields: all(test(terms[i](fields), terms[i + 1](fields)) for i, test in enumerate(tests))
        case _:
            raise SyntaxError(f"{ast.unparse(node)[:60]} is not allowed")


def _field(fields: Mapping[str, Value], name: str) -> Value:
    if (value := fields.get(name)) is None:
        raise _Missing(name)
    return value
