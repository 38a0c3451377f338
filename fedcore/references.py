"""``module:attribute`` in a scenario: a data set, model or strategy of the user, looked up in the scenario's own folder first."""

from __future__ import annotations

import difflib
import importlib
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from fedcore.errors import Refused

__all__ = ["resolve"]

_LOCK = threading.RLock()
_LOADED: dict[Path, dict[str, ModuleType]] = {}  # what each scenario's folder gave so far, by module name


def resolve(reference: str, folder: Path, what: str) -> object:
    """The object that ``module:attribute`` names; ``what`` is the key of the scenario, for errors (``data.dataset``).

    A module or package in ``folder`` wins over an installed one of the same name, also when the user's module imports its
    neighbours at its top level (later imports, inside functions, see installed modules only). The standard library yields only to
    the module that is named. Each folder keeps its own modules, loaded once: the same reference gives the same object.
    ``sys.path`` is not touched; what was imported before stays what other code gets.

    Raises:
        Refused: not of this form, no such module or attribute, or the module fails at import; one line.
    """
    where = f'{what} = "{reference}"'
    name, _, attribute = reference.partition(":")
    if not attribute or not all(name.split(".")):
        raise Refused(f"{where}: must look like module:attribute")
    module = _load(name, folder.resolve(), where)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise Refused(f"{where}: {getattr(module, '__file__', None) or name} has no {attribute}{hint}") from error


def _load(name: str, folder: Path, where: str) -> ModuleType:
    with _LOCK:
        try:
            with _own_modules(folder, name.partition(".")[0]):
                return importlib.import_module(name)
        except Refused:
            raise
        except (Exception, SystemExit) as error:
            raise Refused(f"{where}: {_reason(error, name, folder)}") from error


def _reason(error: BaseException, name: str, folder: Path) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"no module {error.name}, neither in {folder} nor installed"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(folder)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"importing {name} failed: {type(error).__name__}: {' '.join(str(error).split())}{place}"


class _FolderFinder:
    """Import hook: the top-level modules in ``names`` come from ``folder``."""

    def __init__(self, folder: Path, names: set[str]) -> None:
        self._folder = folder
        self._names = names

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(self._folder)], target) if path is None and name in self._names else None


@contextmanager
def _own_modules(folder: Path, wanted: str) -> Iterator[None]:
    """Inside, importing a name that ``folder`` holds gives the folder's module; ``wanted`` even where the standard library has it.

    Modules of other folders make way for good (their scenario keeps them), other modules of the same name until the end.
    """
    names = _own_names(folder, wanted)
    known = _LOADED.setdefault(folder, {})
    for name, module in [pair for other in _LOADED.values() if other is not known for pair in other.items()]:
        if sys.modules.get(name) is module:
            del sys.modules[name]
    hidden = {name for name in names if name in sys.modules and not _lies_in(folder, name, sys.modules[name])}
    shadowed = _pop_modules(hidden)
    sys.modules.update((name, module) for name, module in known.items() if _top(name) in names)
    before = set(sys.modules)
    finder = _FolderFinder(folder, names)
    importlib.invalidate_caches()
    sys.meta_path.insert(0, finder)
    try:
        yield
        known.update((name, module) for name, module in sys.modules.items() if name not in before and _top(name) in names)
    except BaseException:
        for name in [name for name in sys.modules if name not in before and _top(name) in names]:
            del sys.modules[name]
        raise
    finally:
        sys.meta_path.remove(finder)
        _pop_modules(hidden)
        sys.modules.update(shadowed)


def _own_names(folder: Path, wanted: str) -> set[str]:
    found = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    names = found - sys.stdlib_module_names
    if wanted in found or (folder / wanted).is_dir():
        names.add(wanted)
    return names - {"fedcore"}  # a second copy of it would have error classes that nobody catches


def _lies_in(folder: Path, name: str, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", []))
    own = (folder / f"{name}.py", folder / name / "__init__.py", folder / name)
    return any(Path(place).resolve() in own for place in places)


def _pop_modules(tops: set[str]) -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if _top(name) in tops}


def _top(name: str) -> str:
    return name.partition(".")[0]
