"""An Ollama Modelfile: which GGUF file, the chat template in Ollama's language, and what ends an answer.

Ollama reads no Jinja but Go templates. Ours is found by rendering: whatever a chat template writes between two turns depends, in
nearly all of them, on the two roles alone, so those pieces of text are cut out of a rendered conversation and put into one loop.

Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx and template.mdx.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from course_lib.data.conversation import RowError
from course_lib.data.templates import ChatTemplate, render_prompt
from course_lib.export.gguf_tokenizer import begins_with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Roles = tuple[str, str]  # of a turn and of the next; "start" and "answer" stand for what is before and after all
_LOOP = """{{- $last := "start" }}
{{- range .Messages }}
{{- if eq .Role "system" }}START_SYSTEM{{ .Content }}
{{- else if eq .Role "user" }}
{{- if eq $last "system" }}SYSTEM_USER{{ else if eq $last "assistant" }}ASSISTANT_USER{{ else }}START_USER{{ end }}{{ .Content }}
{{- else if eq .Role "assistant" }}USER_ASSISTANT{{ .Content }}
{{- end }}
{{- $last = .Role }}
{{- end }}USER_ANSWER"""


def modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> str:
    """The text of a Modelfile for a GGUF file in the same folder; without a TEMPLATE where there is no faithful one.

    A default system text of the chat template is kept; white space that it cuts off the messages' ends is not cut off by Ollama.
    """
    lines = [f"# ollama create NAME -f {gguf_name.removesuffix('.gguf')}.Modelfile", f"FROM ./{gguf_name}"]
    stops: list[str] = [tokenizer.eos_token] if tokenizer.eos_token else []
    if template is not None:
        stops = [*template.stop_texts, *stops]
        between = texts_between_turns(template, tokenizer)
        if between is None:
            lines.append(
                "# no TEMPLATE: what the chat template writes between turns does not depend on the roles alone"
            )
        else:
            lines.append(f'TEMPLATE """{go_template(between)}"""')
    single = [text for text in dict.fromkeys(stops) if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in single]
    return "\n".join(lines) + "\n"


def texts_between_turns(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> dict[Roles, str] | None:
    """What a chat template writes before, between and after turns, by their roles; None where that depends on more.

    Without a BOS that the tokenizer would put first anyway. The system role is left out where the template does not know it.
    """
    between: dict[Roles, str] = {}
    for first in ([], ["system"]):
        for rounds in (1, 3):
            pieces = _pieces([*first, *["user", "assistant"] * (rounds - 1), "user"], template, tokenizer)
            if not pieces and not first:
                return None
            for pair, text in pieces:
                if between.setdefault(pair, text) != text:
                    return None
    return between


def _pieces(roles: list[str], template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Roles, str]]:
    """A rendered conversation cut at its contents; nothing where the template refuses such roles or leaves a turn out."""
    contents = [f"content-{number}-of-{role}" for number, role in enumerate(roles)]
    messages: list[Any] = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    try:
        text = render_prompt(messages, template, tokenizer).text
    except RowError:
        return []
    bos = tokenizer.bos_token or ""
    if begins_with_bos(tokenizer) and text.startswith(bos):
        text = text.removeprefix(bos)
    pattern = "|".join(map(re.escape, contents))
    if re.findall(pattern, text) != contents:
        return []
    pairs = zip(["start", *roles], [*roles, "answer"], strict=True)
    return list(zip(pairs, re.split(pattern, text), strict=True))


def go_template(between: dict[Roles, str]) -> str:
    """The pieces of `texts_between_turns` as a Go template over Ollama's `.Messages`.

    Each is a string constant: Go would else cut white space off it, and read braces in it.
    """

    def constant(match: re.Match[str]) -> str:
        before, after = match[0].lower().split("_")
        text = between.get((before, after), "")
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

    loop = _LOOP
    if ("start", "system") not in between:  # such a turn is passed over
        loop = loop.replace('{{- if eq .Role "system" }}START_SYSTEM{{ .Content }}\n{{- else if', "{{- if")
        loop = loop.replace('{{- if eq $last "system" }}SYSTEM_USER{{ else if', "{{- if")
    return re.sub(r"[A-Z]+_[A-Z]+", constant, loop)
