"""Plausible wrong answers to the advanced homework, and what the check must say of them."""

MUTANTS = {
    "card": [
        ("does not begin with its front matter", 'card = """---', 'card = """# Pip\n---'),
        ("names another model", "base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "base_model: gpt2"),
        ("license is missing", "license: apache-2.0\n", ""),
        ("not peft", "library_name: peft", "library_name: transformers"),
        ("no end", "language: [en, zh]\n---", "language: [en, zh]"),
        ("a list of en and zh", "[en, zh]", "en"),
        ("cannot do", "Limits: it is very small and often wrong; do not use it for advice.", ""),
        ("base_model is missing", "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n", ""),
    ],
    "files": [
        ("would be published", "if name in wanted", "if not name.startswith('checkpoint')"),
        ("an adapter half trained", "if name in wanted", "if name.split('/')[-1] in wanted"),
        ("is left out", '"adapter_config.json", ', ""),
        ("a list of file names", "return [name for name in names if name in wanted]", "return 'README.md'"),
    ],
    "publish": [
        ("the repository is public", "private=True, ", ""),
        ("was published: it holds passwords", ", allow_patterns=names", ""),
        ("stopped with", ", exist_ok=True", ""),
        ("not the one that was given", "HfApi(token=token)", 'HfApi(token="hf_mine")'),
        (
            "one is enough",
            "    api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names)\n",
            "    for name in names:\n        api.upload_file(repo_id=repository, path_or_fileobj=f'{folder}/{name}', path_in_repo=name)\n",
        ),
        ("was not published", '"README.md", ', ""),
        ("returns nothing", "return str(url)", "str(url)"),
    ],
    "request": [
        ("remembers nothing", "*history, ", ""),
        ("is changed", "    first =", '    history.append({"role": "user", "content": question})\n    first ='),
        ("stream is not true", "True", "False"),
        (
            "comes once, and first",
            '[*first, *history, {"role": "user", "content": question}]',
            '[*history, *first, {"role": "user", "content": question}]',
        ),
        ("leave it out", " if system else []", ""),
        (
            "not the last message",
            '*history, {"role": "user", "content": question}',
            '{"role": "user", "content": question}, *history',
        ),
    ],
    "stream": [
        ("behind [DONE]", "break", "continue"),
        ("no text", 'choice["delta"].get("content") or ""', 'str(choice["delta"].get("content"))'),
        ("white space", 'choice["delta"].get("content") or ""', '(choice["delta"].get("content") or "").strip("\\n")'),
        ("between the pieces", '"".join(pieces)', '" ".join(pieces)'),
        ("stopped with", 'if not line.startswith("data: "):\n            continue', "pass"),
        ("stopped with KeyError", '.get("content") or ""', '["content"]'),
    ],
    "app": [
        ("a key stands in the source", 'os.environ["SERVER_KEY"]', '"sk-abcdefgh12345678"'),
        ("would be forgotten", 'st.session_state.setdefault("history", [])', "[]"),
        (
            "come from nowhere",
            'base_url=os.environ["SERVER"], api_key=os.environ["SERVER_KEY"]',
            'base_url="http://localhost", api_key="x"',
        ),
        ("to type into", "st.chat_input", "st.text_area"),
        ("does not even start", "import os\n", "import os:\n"),
    ],
}
