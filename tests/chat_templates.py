"""Chat templates with the habits of real ones, each in a few lines."""

# A default system message; contents as they are; tools answer inside a user's message.
QWEN25 = """\
{%- if messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% else -%}
<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif not (message.role == 'system' and loop.first) -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# Thinking is taken out of all turns before the user's last message.
QWEN3 = """\
{%- set last = namespace(index=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set last.index = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' and '</think>' in content and loop.index0 < last.index -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# Its own bos; contents without the blanks around them.
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{{- message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

# Roles alternate; the system message is part of the first one; no generation prompt; a blank before answers.
MISTRAL = """\
{%- if messages[0].role == 'system' -%}
{%- set system, rest = messages[0].content + '\\n\\n', messages[1:] -%}
{%- else -%}{%- set system, rest = '', messages -%}{%- endif -%}
{{- bos_token -}}
{%- for message in rest -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- if message.role == 'user' -%}
{{- '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' -}}
{%- else -%}
{{- ' ' + message.content | trim + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

# No system message; another name for the assistant; trimmed.
GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# Thinking is opened for the assistant, and not where it has been.
DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- '[INST]' + message.content -}}{%- endif -%}
{%- if message.role == 'assistant' -%}{{- '[/INST]' + message.content + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[/INST]<think>\\n' -}}{%- endif -%}
"""

ESCAPING = "{%- for message in messages -%}{{- message | tojson -}}{%- endfor -%}"
FORGETFUL = "{{- messages[-1].content -}}"
TWICE = "{%- for message in messages -%}{{- message.content + message.content -}}{%- endfor -%}"
