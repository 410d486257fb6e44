"""Twenty clients at once on a real model: the answers of each alone, and memory that stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

pytestmark = [pytest.mark.embedded, pytest.mark.slow]
MIB = 2**20
COUNTRIES = ("France", "Italy", "Japan", "Egypt", "Brazil", "Canada", "Kenya", "Peru", "Norway", "India")


def test_twenty_clients_at_once_get_the_answers_they_get_alone(embedded: Path) -> None:
    command = [sys.executable, "-m", "course_lib.cli", "serve", str(embedded), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            ready = server.stderr.readline()
            assert "serving" in ready, ready
            threading.Thread(target=server.stderr.read, daemon=True).start()
            url, memory = ready.split()[3], psutil.Process(server.pid)

            def ask(number: int) -> str:
                """Each client asks its own question; the second ten stream."""
                client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
                question = f"What is the capital of {COUNTRIES[number % 10]}?"
                asked = {"model": client.models.list().data[0].id, "messages": [{"role": "user", "content": question}]}
                if number < 10:
                    return client.chat.completions.create(**asked, max_tokens=12).choices[0].message.content
                stream = client.chat.completions.create(**asked, max_tokens=12, stream=True)
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

            alone = [ask(number) for number in range(10)]
            before = memory.memory_info().rss
            start = threading.Barrier(20)
            with ThreadPoolExecutor(20) as pool:
                together = list(pool.map(lambda number: (start.wait(), ask(number))[1], range(20)))
            assert together == alone * 2
            after = memory.memory_info().rss
            print(json.dumps({"alone": alone, "rss_mib": [before // MIB, after // MIB]}))
            assert len(set(alone)) == 10
            assert any("Paris" in answer for answer in alone)
            assert after - before < 100 * MIB
        finally:
            server.kill()
