"""Which field of a record holds what."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Names of a source's fields (columns); `a.b` is the field b of the object in a.

    Attributes:
      prompt: the question as text, or a chat as a list of {"role", "content"}, which goes through
        the tokenizer's chat template.
      response: what the model should write.
      answer: the reference answer; may be missing.
      id: names the record; may be missing, must not repeat within a source.
      chat_text: a whole chat as one string, framed by `<|im_start|>` and `<|im_end|>` as in the
        published ThreadWeaver sets; read where a record has no `response`.
      as_chat: wrap prompts that are plain text as the only turn of a chat.
    """

    prompt: str = "prompt"
    response: str = "response"
    answer: str = "answer"
    id: str = "id"
    chat_text: str = "qwen_text"
    as_chat: bool = False


DEFAULT_COLUMNS = ColumnsConfig()
