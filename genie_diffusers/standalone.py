"""A scheduler in one file, made of the sources of this package, for those who have diffusers and not the package.

The file has the definition of the class, those of whatever it names, and so on, in the order in which the modules
import each other, and imports of other packages alone.
"""

import ast
import builtins
import graphlib
import importlib
import inspect
import sys
from importlib.util import resolve_name
from symtable import SymbolTable, symtable

#: modules of the package, and what a file has in their place
REPLACED = {"genie_diffusers.schedulers.saving": "genie_diffusers.schedulers.saving_itself"}

#: names that every module has
MODULE = {"__file__", "__name__"}

HEADER = '''\
"""
{name} in one file, for those who have diffusers and not genie_diffusers.

It was made of the sources of genie_diffusers {version} by

    {name}.save_pretrained(folder, standalone=True)

To change it, change those and save again. With genie_diffusers installed, `from_pretrained` of the class there reads
the same configuration, and none of this code is run.
"""

# What is of genie_diffusers here is copyright of the genie_diffusers authors and licensed under the Apache License,
# Version 2.0 (the "License"); you may not use it except in compliance with the License. You may obtain a copy at
# https://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND,
# either express or implied. See the License for the specific language governing permissions and limitations.
'''


def standalone_source(scheduler_class: type) -> str:
    """
    The source of a file that defines a scheduler without this package.

    Args:
        scheduler_class (`type`):
            A scheduler of this package, or one that derives from it at the top of some file. What that file imports
            from its own package becomes a part of the source, what it imports from others stays an import.
            Statements that bind no name, such as calls, are left out.

    Raises:
        ValueError:
            If the class is not defined at the top of a file, or if what it is made of does not fit into one file:
            where two things have one name, and where names come from elsewhere than the top of their file.
    """
    from . import __version__

    name, home = scheduler_class.__name__, scheduler_class.__module__
    file = _File({__name__.partition(".")[0], home.partition(".")[0]})
    try:
        defined = scheduler_class.__qualname__ == name and name in file.read(home)
    except (ImportError, OSError, TypeError):  # there is no file
        defined = False
    if not defined:
        raise ValueError(
            "`standalone=True` needs a scheduler that is defined at the top of a file, got "
            f"`{home}.{scheduler_class.__qualname__}`."
        )
    file.add(home, name)
    source = HEADER.format(name=name, version=__version__) + file.text()
    unknown = sorted(_named(symtable(source, name, "exec")) - file.owners.keys() - vars(builtins).keys() - MODULE)
    if unknown:
        raise ValueError(
            f"`standalone=True` needs names that are defined or imported at the top of a file, by name; `{name}` has "
            f"{', '.join(f'`{what}`' for what in unknown)} from elsewhere."
        )
    return source


class _File:
    """Statements from the tops of modules of some `packages`, and imports of all others."""

    def __init__(self, packages: set[str]):
        self.packages = packages
        #: by module, the statements that bind a name at its top, those of them that are needed, and what it imports
        self.definitions: dict[str, dict[str, list[ast.stmt]]] = {}
        self.needed: dict[str, set[ast.stmt]] = {}
        self.uses: dict[str, list[str]] = {}
        #: what statements are in their module
        self.texts: dict[ast.stmt, str] = {}
        self.imports: set[tuple[str, str]] = set()
        #: what a name is here: where it is from, and the text that binds it
        self.owners: dict[str, tuple[str, str]] = {}

    def read(self, module: str) -> dict[str, list[ast.stmt]]:
        """What is defined at the top of a module, by name."""
        if module not in self.definitions:
            source = inspect.getsource(importlib.import_module(module))
            lines, end = source.split("\n"), 0
            definitions: dict[str, list[ast.stmt]] = {}
            for statement in ast.parse(source).body:
                # with the comments before it
                self.texts[statement] = "\n".join(lines[end : statement.end_lineno])
                end = statement.end_lineno or end
                for name in _bound(statement):
                    definitions.setdefault(name, []).append(statement)
            self.definitions[module], self.needed[module], self.uses[module] = definitions, set(), []
        return self.definitions[module]

    def add(self, module: str, name: str):
        """Add what `name` is in `module`, and all that this names in turn."""
        for statement in self.read(module).get(name, ()):  # none for what is local or built in
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                self._import(module, name, statement)
            elif statement not in self.needed[module]:
                self.needed[module].add(statement)
                for bound in _bound(statement):
                    self._own(bound, module, self.texts[statement].strip())
                for named in sorted(_named(symtable(self.texts[statement], module, "exec"))):
                    self.add(module, named)

    def _import(self, module: str, name: str, statement: ast.Import | ast.ImportFrom):
        alias = next(alias for alias in statement.names if _name_of(alias) == name)
        origin = alias.name
        if isinstance(statement, ast.ImportFrom):
            relative = "." * statement.level + (statement.module or "")
            origin = resolve_name(relative, sys.modules[module].__package__) if statement.level else relative
        if origin.partition(".")[0] in self.packages:
            if isinstance(statement, ast.ImportFrom) and alias.asname in (None, alias.name):
                origin = REPLACED.get(origin, origin)
                self.uses[module].append(origin)
                self.add(origin, name)
            return
        what = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
        self.imports.add(("" if isinstance(statement, ast.Import) else origin, what))
        self._own(name, origin, f"import {what} of {origin}")

    def _own(self, name: str, origin: str, text: str):
        known = self.owners.setdefault(name, (origin, text))
        # two modules may say the same of a name, such as that of their logger
        if (origin != known[0] and text != known[1]) or name in vars(builtins):
            raise ValueError(
                f"`standalone=True` puts all that a scheduler is made of into one file, and `{name}` of `{origin}` is "
                f"defined in `{'builtins' if name in vars(builtins) else known[0]}` too: rename one of them."
            )

    def text(self) -> str:
        """Imports, then the statements of each module, after those of the modules that it imports."""
        by_origin: dict[str, list[str]] = {}
        for origin, what in sorted(self.imports):
            by_origin.setdefault(origin, []).append(what)
        plain = [f"import {what}" for what in by_origin.pop("", ())]
        named = [f"from {origin} import {', '.join(names)}" for origin, names in by_origin.items()]
        standard = [line for line in plain + named if line.split()[1].partition(".")[0] in sys.stdlib_module_names]
        others = [line for line in plain + named if line not in standard]
        parts = ["\n".join(lines) for lines in (standard, others) if lines]
        for module in graphlib.TopologicalSorter(self.uses).static_order():
            statements = sorted(self.needed[module], key=lambda statement: statement.lineno)
            if statements:
                body = "\n".join(self.texts[statement] for statement in statements).strip("\n")
                parts.append(f"# --- {module} ".ljust(119, "-") + f"\n\n{body}\n")
        return "\n" + "\n\n".join(parts)


def _name_of(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module binds there."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [_name_of(alias) for alias in statement.names]
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    nodes = ast.walk(statement)
    return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _named(table: SymbolTable) -> set[str]:
    """The names that code takes from the top of its module, or from there are built in."""
    top = table.get_type() == "module"
    names = {
        symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced() and (top or symbol.is_global())
    }
    return names.union(*map(_named, table.get_children()))
