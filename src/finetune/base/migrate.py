"""Files of an older schema, brought up to date when they are read: nobody has to keep an old version of the kit.

Each step is a pure function from the plain values of one schema to those of the next. Steps change structure only:
what was computed in some way goes on being computed in that way.
"""

from collections.abc import Callable, Mapping

from finetune.base.files import BadFile
from finetune.base.plain import Plain
from finetune.errors import RunError

SCHEMA_KEY = "schema_version"
# From the schema that is its key to the next one.
Steps = Mapping[int, Callable[[Plain], Plain]]


def migrate(
    plain: Plain, what: str, newest: int, steps: Steps, instead: str = "use the version that wrote it"
) -> Plain:
    """Plain values of any schema, as the newest schema has them. What is given is not changed.

    Args:
        what: what to call it in an error.
        newest: the schema that this version writes.
        steps: one for each older schema that can be read.
        instead: what to do with one that is too old.

    Raises:
        BadFile: it names no schema.
        RunError: it is of a newer schema, or of one that there is no step for.
    """
    schema = plain.get(SCHEMA_KEY)
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise BadFile(f"{what} names no schema; restore it from a copy")
    if schema > newest:
        raise RunError(f"{what} has schema {schema}, this finetune reads {newest}: a newer version wrote it; upgrade")
    if any(number not in steps for number in range(schema, newest)):
        oldest = min(steps, default=newest)
        reads = f"{oldest} to {newest}" if oldest < newest else newest
        raise RunError(f"{what} has schema {schema}, this finetune reads {reads}; {instead}")
    for number in range(schema, newest):
        plain = steps[number](plain) | {SCHEMA_KEY: number + 1}
    return plain
