"""Data and parameters, as authors name them. In an f-string each leaves a marker, which lowering takes apart again."""

from __future__ import annotations

from mlpiped.sdk import values
from mlpiped.sdk.errors import DefinitionError
from mlpiped.sdk.place import here

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from mlpiped.sdk.steps import Step

    Scalar = str | int | float | bool | None

MISSING: object = object()

_marked: dict[str, Placeholder] = {}


class Placeholder:
    """Something whose value is known only when a step runs."""

    def __init__(self) -> None:
        self.where = here()

    def __str__(self) -> str:
        mark = f"{values.MARK}{id(self):x}{values.MARK}"
        _marked[mark.strip(values.MARK)] = self  # keeps the object, and so its id, for as long as the process lives
        return mark

    def __format__(self, form: str) -> str:
        if form:
            raise DefinitionError(
                f"`{{…:{form}}}` cannot format {self!r}: its value is known only when the step runs",
                here(),
                "format it in the script",
            )
        return str(self)

    def __bool__(self) -> bool:
        raise DefinitionError(f"{self!r} has no value yet: it is known only when the step runs", here())


def split(text: str) -> list[str | Placeholder]:
    """The pieces of a text that may hold markers. Raises ValueError for a NUL that is no marker of ours."""
    pieces: list[str | Placeholder] = []
    for number, piece in enumerate(text.split(values.MARK)):
        if number % 2 == 0:
            if piece:
                pieces.append(piece)
        elif piece in _marked:
            pieces.append(_marked[piece])
        else:
            raise ValueError("unknown marker")
    if text.count(values.MARK) % 2:
        raise ValueError("half a marker")
    return pieces


class Datastore:
    """A named place for data: `[datastores.NAME]` in the daemon's config."""

    def __init__(self, name: str) -> None:
        self.where = here()
        self.name = values.name(name, "the name of a datastore", self.where)

    def __repr__(self) -> str:
        return f"Datastore({self.name!r})"


def _store(datastore: Datastore | str, what: str, where: tuple[str, int]) -> str:
    if isinstance(datastore, Datastore):
        return datastore.name
    if isinstance(datastore, str):
        return values.name(datastore, f"the datastore of {what}", where)
    raise DefinitionError(f"the datastore of {what} is {values.shown(datastore)}", where, "write `Datastore(NAME)`")


class DataReference(Placeholder):
    """Data that lies in a datastore: a file, a folder, or a glob (`*`, `?`, `[…]`, `**`) below its root.

    `name` is what people see; the default is the variable that holds the reference, else a word of the path.
    """

    def __init__(
        self, datastore: Datastore | str, path: str, *, name: str | None = None, glob: bool | None = None
    ) -> None:
        super().__init__()
        self.datastore = _store(datastore, "a data reference", self.where)
        self.path = values.text(path, "the path of a data reference", self.where)
        self.glob = any(c in self.path for c in "*?[") if glob is None else values.flag(glob, "glob", self.where)
        self.name = None if name is None else values.name(name, "the name of a data reference", self.where)
        self.variable: str | None = None  # the loader's child knows it after the import

    @property
    def shown_name(self) -> str:
        if self.name or self.variable:
            return str(self.name or self.variable)
        plain = [part for part in self.path.split("/") if part not in ("", ".", "..") and not set(part) & set("*?[")]
        return values.name_from(plain[-1] if plain else "", self.datastore)

    def __repr__(self) -> str:
        return f"DataReference({self.datastore!r}, {self.path!r})"


class PipelineData(Placeholder):
    """What a step makes. The one step that has it in `outputs=` writes it; every step that is given it reads it.

    `path` is the file name that the script is given (default: `name`); with a `datastore` it is also where the
    result is published, and may name folders. With `keep="remote"` it stays on the machine that made it until somebody
    needs it elsewhere; a machine that cannot keep it sends it home at once.
    """

    def __init__(
        self,
        name: str,
        datastore: Datastore | str | None = None,
        path: str | None = None,
        kind: Literal["file", "folder"] = "file",
        keep: Literal["home", "remote"] = "home",
    ) -> None:
        super().__init__()
        self.name = values.name(name, "the name of pipeline data", self.where)
        self.keep = values.choice(keep, ("home", "remote"), f"keep of `{self.name}`", self.where)
        self.kind = values.choice(kind, ("file", "folder"), f"kind of `{self.name}`", self.where)
        self.datastore = None if datastore is None else _store(datastore, f"`{self.name}`", self.where)
        self.published: str | None = None
        self.producers: list[Step] = []
        self.file_name = self.name
        if path is not None:
            form = values.text(path, f"the path of `{self.name}`", self.where).rstrip("/")
            self.file_name = form.rpartition("/")[2]
            if self.datastore is not None:
                self.published = form
            elif self.file_name != form:
                raise DefinitionError(
                    f"the path of `{self.name}` names folders, but no datastore: {path!r}",
                    self.where,
                    "give a file name, or add `datastore=`",
                )

    def publish(self, path: str, datastore: Datastore | str | None = None) -> PipelineData:
        """Also put it into its datastore, at `path`; {pipeline}, {run_id}, {step} and {output} are filled in."""
        where = here()
        if datastore is not None:
            self.datastore = _store(datastore, f"`{self.name}`", where)
        if self.datastore is None:
            raise DefinitionError(f"no datastore to publish `{self.name}` in", where, "add `datastore=`")
        self.published = values.text(path, f"the path to publish `{self.name}` at", where).rstrip("/")
        return self

    def __repr__(self) -> str:
        return f"PipelineData({self.name!r})"


_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


class PipelineParameter(Placeholder):
    """A value that each run may choose. Its type is its default's, or `type=`; without a default it is required."""

    def __init__(
        self,
        name: str,
        default: Scalar = MISSING,  # type: ignore[assignment]
        *,
        type: type[str] | type[int] | type[float] | type[bool] | str | None = None,
        choices: Sequence[Scalar] = (),
        description: str = "",
    ) -> None:
        super().__init__()
        self.name = values.name(name, "the name of a parameter", self.where)
        self.required = default is MISSING
        self.type = self._type(None if self.required else default, type)
        self.default = None if self.required else self._typed(default, "the default")
        self.choices = tuple(
            self._typed(one, "a choice") for one in values.listed(choices, f"choices of `{name}`", self.where)
        )
        self.description = values.text(description, f"the description of `{name}`", self.where, empty=True)
        if self.choices and self.default is not None and self.default not in self.choices:
            raise DefinitionError(f"the default of `{name}` is none of its choices: {default!r}", self.where)

    def _type(self, default: object, wanted: object) -> str:
        word = getattr(wanted, "__name__", wanted)
        if wanted is None:
            word = default.__class__.__name__
            if default is None:
                raise DefinitionError(
                    f"parameter `{self.name}` has neither a default nor a type", self.where, "add `type=`"
                )
        if not isinstance(word, str) or word not in _TYPES:
            raise DefinitionError(
                f"parameter `{self.name}` has type {values.shown(word)}", self.where, "it is str, int, float or bool"
            )
        return word

    def _typed(self, value: object, what: str) -> Scalar:
        """`value` as this parameter's type. A bool is no int; an int is a float where a float is wanted."""
        if value is None and what == "the default":
            return None
        if self.type == "float" and type(value) is int:
            value = float(value)
        if type(value) is not _TYPES[self.type]:
            raise DefinitionError(f"{what} of parameter `{self.name}` is no {self.type}: {value!r}", self.where)
        if isinstance(value, float) and not float("-inf") < value < float("inf"):
            raise DefinitionError(f"{what} of parameter `{self.name}` is not a finite number: {value}", self.where)
        if isinstance(value, str):
            values.text(value, f"{what} of parameter `{self.name}`", self.where, empty=True)
        return value  # type: ignore[return-value]

    def plain(self) -> dict[str, object]:
        return {
            "name": self.name,
            "type": self.type,
            "default": self.default,
            "required": self.required,
            "choices": list(self.choices),
            "description": self.description,
        }

    def __repr__(self) -> str:
        return f"PipelineParameter({self.name!r})"
