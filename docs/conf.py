"""The course site, from the committed notebooks and the package's docstrings. `minijamba site` builds it, offline."""

import json
import re
from importlib.util import find_spec

from docutils import nodes
from sphinx.writers.html5 import HTML5Translator as Writer
from sphinx_exercise.nodes import solution_node

import minijamba

# With the public address of the repository here, as "https://github.com/OWNER/minijamba", every page gets buttons that
# open its source there and its notebook on Colab. Without one there are none: a dead link is worse.
REPOSITORY = None

project = "minijamba"
author = "the minijamba authors"
copyright = "the minijamba authors, Apache-2.0"
version = release = minijamba.__version__

# The sources keep their places in the repository, where the same relative links hold.
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/**", "README.md", "CONTRIBUTING.md", "data/checkpoints/python/README.md"]
exclude_patterns = ["**/.ipynb_checkpoints"]
extensions = ["myst_nb", "sphinx_exercise", "sphinx_copybutton", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the committed outputs are shown, which the tests compare with a run
nb_code_prompt_show = "Show the check"
nb_code_prompt_hide = "Hide the check"
exercise_style = "solution_follow_exercise"
mathjax_path = "mathjax/tex-mml-chtml.js"  # in _static, so that no page needs the network

autodoc_default_options = {"members": True, "ignore-module-all": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # SHIPPED, and not the folder that it is on the machine that builds
autodoc_mock_imports = [package for package in ("triton", "lm_eval") if find_spec(package) is None]
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100
# Types of other packages have their documentation elsewhere, and this site links to nothing that must be fetched.
nitpick_ignore_regex = [(r"py:\w+", r"(?!minijamba\.).*")]

html_theme = "sphinx_book_theme"
html_title = "minijamba"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system, until the switch is used
html_sourcelink_suffix = ""
html_additional_pages = {"index": "to_docs.html"}
templates_path = ["_templates"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "use_fullscreen_button": False}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": REPOSITORY,
        "repository_branch": "main",
        "use_repository_button": True,
        "use_source_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }

NOTEBOOK = re.compile(r"notebooks/(\d\d)_\w+")
EXERCISE = re.compile(r"### Exercise (\d+) · ([^\n]+)\n(.*)", re.DOTALL)
EXACT = re.compile(r"^(?: |>>> |- |\w+(?:, \w+)*:(?: |$))", re.MULTILINE)  # the first line that is more than prose
FOLD = re.compile(r"<details>\s*<summary>(.*?)</summary>\n(.*?)\n</details>", re.DOTALL)


def setup(app):
    app.connect("source-read", read_notebook)
    app.connect("doctree-read", finish_notebook)
    app.connect("autodoc-process-docstring", keep_as_written)
    app.add_node(solution_node, override=True, html=(Writer.visit_admonition, Writer.depart_admonition))


def read_notebook(app, docname, source):
    """Turns the plain exercises of a notebook, which JupyterLab shows, into directives."""
    if app.env.doc2path(docname).suffix != ".ipynb":
        return
    notebook = json.loads(source[0])
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    app.env.temp_data["alt"] = [output["metadata"].get("image/png", {}).get("alt", "") for output in pictures]
    if number := NOTEBOOK.fullmatch(docname):
        texts = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
        for cell, text in zip(texts, directives(["".join(cell["source"]) for cell in texts], number[1]), strict=True):
            cell["source"] = text
        source[0] = json.dumps(notebook)


def directives(texts, number):
    """The markdown of notebook `number`, cell by cell, with directives for its exercises, hints and solutions."""
    label = None
    for text in texts:
        if exercise := EXERCISE.match(text):
            name, kind, statement = exercise.groups()
            label = f"{number}-{name}"
            head = f"::::{{exercise}} {kind}\n:label: ex-{label}\n:nonumber:"
            text = f"### Exercise {name}\n\n{head}\n\n{folded(statement)}\n::::"
        elif (solution := FOLD.fullmatch(text.strip())) and solution[1] == "Solution" and label:
            text = f"::::{{solution}} ex-{label}\n:label: sol-{label}\n:class: dropdown\n\n{folded(solution[2])}\n::::"
        yield folded(text)


def folded(text):
    """Every fold that is left, as an admonition that folds."""
    return FOLD.sub(r":::{admonition} \1\n:class: dropdown\n:collapsible: closed\n\2\n:::", text)


def finish_notebook(app, document):
    """Pictures of outputs get the words for those who cannot see them; solutions are folded."""
    pictures = [picture for picture in document.findall(nodes.image) if "alt" not in picture]
    for picture, alt in zip(pictures, app.env.temp_data.pop("alt", []), strict=True):
        picture["alt"] = alt
    for solution in document.findall(solution_node):
        solution["collapsible"] = "closed"


def keep_as_written(app, what, name, thing, options, lines):
    """Docstrings are plain text: what they say is set as prose, and equations, shapes and lists to the letter."""
    text = re.sub(r"^Alias for field number \d+$", "", "\n".join(lines).strip())  # Python's words on a NamedTuple
    lines[:] = []
    for paragraph in re.split(r"\n\s*\n", text):
        exact = EXACT.search(paragraph)
        prose, kept = (paragraph[: exact.start()], paragraph[exact.start() :]) if exact else (paragraph, "")
        lines += [*re.sub(r"`[^`]+`|[\\*_|<>]", as_prose, prose).split("\n"), ""]
        if kept:
            lines += [".. code-block:: text", "", *("   " + line for line in kept.split("\n")), ""]


def as_prose(match):
    """Code between backticks stays code; a sign that reStructuredText would take for its own does not mean anything."""
    return f"`{match[0]}`" if match[0].startswith("`") else f"\\{match[0]}"
