"""Asks a server a number of questions, for a test that kills it: URL LOG COUNT."""

import pathlib
import sys

from sami_jax.chat.answer_log import open_log
from sami_jax.chat.answers import Answers
from sami_jax.chat.client import Server
from sami_jax.chat.costs import Prices
from sami_jax.chat.questions import Question
from sami_jax.config.chat import ChatConfig

url, path, count = sys.argv[1:]
config = ChatConfig(base_url=url, chat_model="big", concurrency=4)
with open_log(pathlib.Path(path)) as log:
    answers = Answers(Server(config), log, prices=Prices.of(config), max_cost_usd=0.0, safe_point=lambda: None)
    print("asking", flush=True)
    answers.ask([Question(f"question {number:02d}") for number in range(int(count))])
