#!/usr/bin/env python3
"""Makes tests/golden/chat_templates.jsonl: what Transformers renders of random conversations through templates
written in the published styles, and of small snippets that each try a corner of Jinja.

    python tools/make_chat_golden.py > tests/golden/chat_templates.jsonl          the committed set
    python tools/make_chat_golden.py --seed 7 --count 2000                        a larger one, for a differential run

The first line has the conversation of the snippets. {"template": text} gives the template of the lines after it;
{"messages", "tools"?, "prompt", "variables"?, "text", "assistant"?} is one rendering; {"snippet": true, "text"} one of the
snippets' conversation; "error": true in place of text where the reference refuses. "assistant": the parts said by the
assistant with their end of turn, by the reference's own marks or by how the style is made. Needs transformers and jinja2."""
import argparse
import datetime
import json
import random
import sys

import transformers.utils.chat_template_utils as reference

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = datetime.datetime(2025, 7, 1, 0, 0, 0)


class FixedClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


reference.datetime = FixedClock

CHATML = r"""{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA2 = r"""{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = r"""{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}

{#- The system message goes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {{- "You have access to these functions:\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- ', "id": "call00000"}' }}
            {%- else %}
                {{- ', "id": "' + tool_call.id + '"}' }}
            {%- endif %}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

PHI3 = r"""{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = r"""{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

GEMMA = r"""{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""

DEEPSEEK = r"""{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + tool['function']['arguments']|tojson + '\n' + '```' + '<｜tool▁call▁end｜>'}}{%- set ns.is_first = true -%}{%- else %}{{'\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + tool['function']['arguments']|tojson + '\n' + '```' + '<｜tool▁call▁end｜>'}}{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- set ns.is_output_first = false %}{%- else %}{{'\n<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\n'}}{% endif %}"""

SMOLLM = r"""{# SmolLM-like, with marks #}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- if enable_thinking -%}{%- set reasoning_mode = "/think" -%}{%- else -%}{%- set reasoning_mode = "/no_think" -%}{%- endif -%}
{{- "<|im_start|>system\n" -}}
{%- if messages[0].role == "system" -%}
  {%- set system_message = messages[0].content -%}
  {%- if "/no_think" in system_message -%}{%- set reasoning_mode = "/no_think" -%}{%- endif -%}
  {%- set custom_instructions = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "Knowledge Cutoff Date: June 2025\n" -}}
{%- set today = strftime_now("%d %B %Y") -%}
{{- "Today Date: " ~ today ~ "\n" -}}
{{- "Reasoning Mode: " + reasoning_mode + "\n\n" -}}
{%- if custom_instructions -%}{{- custom_instructions + "\n\n" -}}{%- endif -%}
{%- if tools or xml_tools -%}
  {%- set tool_list = (tools or []) -%}
  {{- "### Tools\n\n" -}}
  {%- set xml_tool_string = namespace(value="<tools>\n") -%}
  {%- for tool in tool_list[:2] -%}
    {%- set xml_tool_string.value = xml_tool_string.value ~ (tool | string) ~ "\n" -%}
  {%- endfor -%}
  {{- xml_tool_string.value + "</tools>\n\n" -}}
{%- endif -%}
{{- "<|im_end|>\n" -}}
{%- for message in messages -%}
  {%- set content = message.content if message.content is string else "" -%}
  {%- if message.role == "user" -%}
    {{ "<|im_start|>" + message.role + "\n"  + content + "<|im_end|>\n" }}
  {%- elif message.role == "assistant" -%}
    {%- generation -%}
    {%- if reasoning_mode == "/think" -%}
      {{ "<|im_start|>assistant\n" + content.lstrip("\n") + "<|im_end|>\n" }}
    {%- else -%}
      {{ "<|im_start|>assistant\n" + "<think>\n\n</think>\n" + content.lstrip("\n") + "<|im_end|>\n" }}
    {%- endif -%}
    {%- endgeneration -%}
  {%- elif message.role == "tool" -%}
    {{ "<|im_start|>" + "user\n"  + content + "<|im_end|>\n" }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if reasoning_mode == "/think" -%}{{ "<|im_start|>assistant\n" }}{%- else -%}{{ "<|im_start|>assistant\n" + "<think>\n\n</think>\n"  }}{%- endif -%}
{%- endif -%}"""

COMMAND_R = r'''{{ bos_token }}{%- macro json_to_python_type(json_spec) %}
{%- set basic_type_map = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
{%- if basic_type_map[json_spec.type] is defined %}
{{- basic_type_map[json_spec.type] }}
{%- elif json_spec.type == "array" %}
{{- "List[" +  json_to_python_type(json_spec["items"]) + "]" }}
{%- elif json_spec.type == "object" %}
{%- if json_spec.additionalProperties is defined %}
{{- "Dict[str, " + json_to_python_type(json_spec.additionalProperties) + ']' }}
{%- else %}
{{- "Dict" }}
{%- endif %}
{%- elif json_spec.type is iterable %}
{{- "Union[" }}
{%- for t in json_spec.type %}
{{- json_to_python_type({"type": t}) }}
{%- if not loop.last %}{{- "," }}{%- endif %}
{%- endfor %}
{{- "]" }}
{%- else %}
{{- "Any" }}
{%- endif %}
{%- endmacro %}

{%- macro tool_parser(tools) %}
{%- for tool in tools %}
{%- if tool.type is defined and tool.type == 'function' %}{%- set tool = tool.function %}{%- endif %}
{{- '```python
def ' + tool.name + '(' }}
{%- for param_name, param_fields in tool.parameters.properties|items %}
{%- if loop.index0 != 0 %}{{ ', ' }}{%- endif -%}
{{- param_name + ": " }}
{%- if not param_name in tool.parameters.required %}
{{- 'Optional[' + json_to_python_type(param_fields) + '] = None'}}
{%- else %}
{{- json_to_python_type(param_fields) }}
{%- endif %}
{%- endfor %}
{{- ') -> List[Dict]:
    """'}}
{{- tool.description }}
{{- '"""
    pass
```' }}
{%- endfor %}
{%- endmacro %}
{%- if messages[0]['role'] == 'system' %}{%- set loop_messages = messages[1:] %}{%- set system_message = messages[0]['content'] %}{%- else %}{%- set loop_messages = messages %}{%- set system_message = '## Task' %}{%- endif %}
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' }}{{ system_message }}{{ '

## Available Tools
' }}{{ tool_parser(tools) if tools }}{{ '<|END_OF_TURN_TOKEN|>'}}
{%- for message in loop_messages %}
{%- set content = message['content'] %}
{%- if message.role == 'user' %}
{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- elif message.role == 'system' %}
{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- elif message.role == 'assistant' and message.tool_calls is defined %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
{%- if content is defined and content %}{{- content|trim }}{%- endif %}
{{- '\nAction:\n```json\n[\n' }}
{%- for tc in message.tool_calls %}
{{- '{\n'|indent(4, first=true) }}
{{- ('"tool_name": "'+tc.function.name+'",\n')|indent(8, first=true) }}
{{- '"parameters": '|indent(8, first=true) }}
{{- tc.function.arguments|tojson(indent=4)|indent(8) }}
{{- '\n' }}
{{- '}'|indent(4, first=true) }}
{%- if not loop.last %}{{- ',\n' }}{%- endif %}
{%- endfor %}
{{- "\n]```\n" }}
{%- elif message.role == 'assistant' %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- elif message.role == 'tool' %}
{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>\n' }}{{ content|string|trim }}{{ '</results><|END_OF_TURN_TOKEN|>' }}
{%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}
'''

QWEN3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

STYLES = [CHATML, LLAMA2, LLAMA3, MISTRAL, PHI3, ZEPHYR, GEMMA, DEEPSEEK, SMOLLM, COMMAND_R, QWEN3]

# What an assistant's turn without tools and reasoning looks like, end of turn included.
TURNS = {
    CHATML: lambda c: c + "<|im_end|>", LLAMA2: lambda c: c.strip() + " </s>", LLAMA3: lambda c: c.strip() + "<|eot_id|>",
    MISTRAL: lambda c: c.strip() + "</s>", PHI3: lambda c: c + "<|end|>", ZEPHYR: lambda c: c + "</s>",
    GEMMA: lambda c: c.strip() + "<end_of_turn>", DEEPSEEK: lambda c: c + "<｜end▁of▁sentence｜>",
    COMMAND_R: lambda c: c.strip() + "<|END_OF_TURN_TOKEN|>"}

CONTENTS = ["Hello!", "  spaces  ", "\n\nlines\n\nmore\n", "", "日本語で", "emoji 😀 and é", "<b>tags</b> & \"quotes\" 'single'",
            "code:\n```c\nint x = 1;\n```", "a <|im_end|> b", "{{ not a tag }} {% neither %}", "tab\there", "<tool_response>\nx\n</tool_response>",
            "x\u00a0y\u2028z", "/no_think please", "{\"json\": [1, 2.5, null]}"]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather at a \"place\".", "parameters": {
    "type": "object", "properties": {"place": {"type": "string", "description": "Où"}, "days": {"type": "array", "items": {"type": "integer"}},
                                     "opts": {"type": "object", "additionalProperties": {"type": ["string", "null"]}}}, "required": ["place"]}}},
         {"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {
             "type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}}}]


def conversation(rng):
    messages = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(CONTENTS)})
    tools = rng.random() < 0.3
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": rng.choice(CONTENTS)})
        if rng.random() < 0.12:
            continue                                    # roles that do not alternate
        if tools and rng.random() < 0.6:
            calls = [{"type": "function", "function": {"name": rng.choice(["get_weather", "add"]), "arguments": rng.choice(
                [{"place": "Zürich"}, {"a": 1, "b": 2.5}, {"a": -1e-7, "b": None}, {"nested": {"x": [True, [], {}]}}])}}
                for _ in range(rng.randint(1, 2))]
            messages.append({"role": "assistant", "content": rng.choice([None, "", "Let me look."]), "tool_calls": calls})
            messages += [{"role": "tool", "name": "f", "content": rng.choice(["42", "{\"t\": 21}"])} for _ in calls]
        if rng.random() < 0.85:
            m = {"role": "assistant", "content": rng.choice(CONTENTS)}
            if rng.random() < 0.2:
                m["content"] = "<think>\nsome reasons\n</think>\n\n" + m["content"]
            elif rng.random() < 0.1:
                m["reasoning_content"] = "because"
            messages.append(m)
    return messages, TOOLS if tools else None


def render(case, template):
    try:
        text, _ = reference.render_jinja_template([case["messages"]], tools=case.get("tools"), chat_template=template,
                                                  add_generation_prompt=case["prompt"], **SPECIAL, **case.get("variables", {}))
    except Exception:
        return {"error": True}
    out = {"text": text[0]}
    said = [m for m in case["messages"] if m["role"] == "assistant"]
    if "generation -%}" in template:
        _, marks = reference.render_jinja_template([case["messages"]], tools=case.get("tools"), chat_template=template, add_generation_prompt=case["prompt"],
                                                   return_assistant_tokens_mask=True, **SPECIAL, **case.get("variables", {}))
        out["assistant"] = [text[0][a:b] for a, b in marks[0]]
    elif template in TURNS and not any("tool_calls" in m or "reasoning_content" in m or "<think>" in m["content"] for m in said):
        out["assistant"] = [TURNS[template](m["content"]) for m in said]
    return out


SNIPPET_MESSAGES = [{"role": "system", "content": "Sys  "}, {"role": "user", "content": " Hé \"x\" <b> 'y' & z\nline2"},
                    {"role": "assistant", "content": "<think>\nr\n</think>\n\nans\u2028x", "tool_calls": [{"type": "function", "function": {
                        "name": "f", "arguments": {"a": 1, "b": [1.5, True, None, 1e20, 1e-7, -0.0], "c": {"d": "é\t\u0001\u007f😀"}}}}]},
                    {"role": "tool", "content": "42", "name": "f"}]
SNIPPET_VARIABLES = {"n": 7, "f": 2.5, "lst": [3, 1, 2], "d": {"b": 1, "a": 2, "C": 3}, "txt": "hello world", "empty": "", "none_v": None}
SNIPPETS = r"""
a{{ n }}b
====
{{ -n|abs }} {{ 2**3**2 }} {{ -2**2 }} {{ 7//2 }} {{ -7//2 }} {{ -7%3 }} {{ 7%-3 }} {{ 7/2 }} {{ 7.0//2 }} {{ 2**-1 }} {{ 1e3 }} {{ 1_000 }} {{ 0x1f }} {{ 1.5e-7 }}
====
{{ 1 + 2 ~ 3 }}
====
{{ 'a' ~ 1 ~ none ~ true ~ 1.0 ~ [1,'x',"it's",none] ~ (1,) ~ () ~ {'a':1} }}
====
{{ messages[0] }} {{ messages[-1]['content'] }} {{ messages[10] }} {{ messages[0].nope }}
====
{{ messages[10].role }}
====
{{ nope.x }}
====
{{ nope }}{{ nope|length }}{% for x in nope %}x{% else %}none{% endfor %}{{ nope|default('dd') }}{{ ''|default('e', true) }}{{ none|default('e') }}
====
{{ nope + 'x' }}
====
{{ nope ~ 'x' }} {{ 'x' in nope }} {{ nope == nope2 }} {{ nope is defined }} {{ nope is not defined }}
====
{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem.role if loop.nextitem is defined }}
{% endfor %}
====
{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ loop.length }}{{ m.role }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}
====
{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }},{% endfor %}
====
{% set x = 0 %}{% for i in range(3) %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}
====
{% set ns = namespace(x=0, y='a') %}{% for i in range(3) %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.y }}{{ ns.z }}
====
{% set ns.x = 1 %}
====
{% set x = {'a':1} %}{% set x.a = 1 %}
====
{% macro m(a, b='B', c=a) %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ m('x') }}{{ m(1, 2) }}{{ m(c=3, a=1) }}{{ m() }}
====
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1,2) }}
====
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(q=2) }}
====
{% macro f(n) %}{% if n > 0 %}{{ n }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(5) }}
====
{% set y = 5 %}{% macro f() %}{{ y }}{% endmacro %}{% for i in [1,2] %}{% set y = i %}{{ f() }}{% endfor %}{% set y = 6 %}{{ f() }}
====
{% macro wrap(t) %}<{{ t }}>{{ caller() }}</{{ t }}>{% endmacro %}{% call wrap('b') %}in {{ n }}{% endcall %}
====
{% macro each(l) %}{% for x in l %}{{ caller(x) }}{% endfor %}{% endmacro %}{% call(i) each(lst) %}({{ i }}){% endcall %}
====
{% set t %}  block {{ n }} {% endset %}[{{ t }}]{% set u | trim | upper %}  block {{ n }} {% endset %}[{{ u }}]
====
{% filter upper %}abc {{ txt }}{% endfilter %}
====
{% with a=1, b=n %}{{ a }}{{ b }}{% endwith %}{{ a }}
====
{% raw %}{{ not }} {% if %}{% endraw %} x
====
  {%- raw -%}  {{ a }}  {%- endraw -%}  y
====
a {# comment #}
b {#- c -#} d
====
   {% if true %}
x
   {% endif %}
  y
====
   {%+ if true %}
x
   {%+ endif +%}
  y
====
{% if true -%}

   x   

{%- endif %}


====
{{ txt }}

====
line
	 {% set a = 1 %}	
 next {% set b = 2 %} same
====
{{ lst[0] }}{{ lst[-1] }}{{ lst[1:] }}{{ lst[::-1] }}{{ lst[:-1] }}{{ lst[5:] }}{{ lst[-2:5] }}{{ 'hello'[1:3] }}{{ 'hello'[::-1] }}{{ 'héllo'[1] }}{{ 'hello'[-1] }}{{ 'hello'[9] }}{{ 'hello'[4:1:-2] }}{{ (1,2,3)[1:] }}{{ lst[::2] }}
====
{{ lst[::0] }}
====
{{ txt.upper() }}{{ txt.title() }}{{ txt.capitalize() }}{{ txt|title }}{{ txt|capitalize }}{{ "it's o'neil-smith (x) [y]"|title }}{{ "it's o'neil-smith".title() }}
====
{{ '  x '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'xyaxy'.lstrip('xy') }}|{{ 'xyaxy'.rstrip('yx') }}|{{ '  a  '|trim }}|{{ 'xxaxx'|trim('x') }}
====
{{ 'a,b,,c'.split(',') }}{{ ' a  b c '.split() }}{{ ' a  b c '.split(none,1) }}{{ 'a,b,c'.split(',',1) }}{{ 'a,b,c'.rsplit(',',1) }}{{ ' a  b c '.rsplit(none,1) }}{{ ''.split(',') }}{{ ''.split() }}{{ 'abc'.split('abc') }}{{ 'a--b--c'.rsplit('--') }}
====
{{ 'a\nb\r\nc\n'.splitlines() }}{{ 'a\nb'.splitlines(true) }}{{ ''.splitlines() }}
====
{{ txt.startswith('he') }}{{ txt.endswith('ld') }}{{ txt.startswith(('x','he')) }}{{ txt.find('o') }}{{ txt.find('zz') }}{{ txt.rfind('o') }}{{ txt.find('o', 5) }}{{ txt.count('l') }}{{ txt.replace('l','L') }}{{ txt.replace('l','L',1) }}{{ 'é,é'.find(',') }}
====
{{ txt.index('zz') }}
====
{{ ','.join(['a','b']) }}{{ ','.join(lst) }}
====
{{ lst|join(',') }}{{ messages|join('|', attribute='role') }}{{ lst|join }}
====
{{ txt.removeprefix('hello ') }}{{ txt.removesuffix('rld') }}{{ '12'.isdigit() }}{{ 'a'.isdigit() }}{{ 'Ab'.islower() }}{{ 'ab1'.islower() }}{{ 'AB'.isupper() }}{{ ' '.isspace() }}
====
{{ tools|tojson }}
====
{{ tools|tojson(indent=2) }}
====
{{ messages[2].tool_calls|tojson }} {{ messages[2].tool_calls[0].function.arguments|tojson(ensure_ascii=true) }}
====
{{ d|tojson(sort_keys=true) }}{{ d|tojson(separators=(',',':')) }}{{ []|tojson(indent=2) }}{{ {}|tojson(indent=4) }}{{ [[],{}]|tojson(indent=4) }}{{ {1:2,none:3,true:4,1.5:2}|tojson }}
====
{{ nope|tojson }}
====
{{ messages[2].tool_calls[0].function.arguments }}
====
{{ d.items() | list }}{{ d.keys()|list }}{{ d.values()|list }}{{ d|items|list }}{{ d|dictsort }}{{ d|dictsort(true) }}{{ d|dictsort(by='value', reverse=true) }}{{ d|list }}{{ d|length }}{{ d|first }}
====
{{ tools[0].function.parameters.properties.items is callable }}{{ tools[0].function.parameters.properties['place'] }}{% for k, v in tools[0].function.parameters.properties.items() %}{{ k }}={{ v.type }};{% endfor %}
====
{{ d.get('a') }}{{ d.get('zz') }}{{ d.get('zz', 5) }}{{ d['a'] }}{{ d['zz'] }}{{ 'a' in d }}{{ 'zz' not in d }}{{ d.a }}{{ d.zz is defined }}
====
{{ messages|map(attribute='role')|list }}{{ messages|map(attribute='nope', default='q')|list }}{{ ['a','b']|map('upper')|join }}{{ messages|selectattr('role','equalto','user')|list|length }}{{ messages|rejectattr('role','equalto','user')|map(attribute='role')|list }}{{ messages|selectattr('tool_calls')|list|length }}{{ messages|selectattr('name','defined')|list|length }}{{ lst|select('odd')|list }}{{ lst|reject('gt',1)|list }}{{ messages|selectattr('role','in',['user','tool'])|map(attribute='role')|join(',') }}
====
{% set u = messages|selectattr('role','equalto','nobody') %}{% if u %}yes{% else %}no{% endif %}{% for x in u %}{% endfor %}
====
{{ messages|selectattr('role','equalto','user')|length }}
====
{% set u = messages|selectattr('role','equalto','user') %}{{ u|list|length }}{{ u|list|length }}{{ (u|list)[0] }}
====
{{ lst|sort }}{{ lst|sort(reverse=true) }}{{ ['b','A','c']|sort }}{{ ['b','A','c']|sort(case_sensitive=true) }}{{ messages|sort(attribute='role')|map(attribute='role')|list }}{{ [1,'a']|unique|list }}{{ ['a','A','b']|unique|list }}{{ lst|min }}{{ lst|max }}{{ lst|sum }}{{ [[1,2],[0,5]]|sort }}
====
{{ [1,'a']|sort }}
====
{{ lst|reverse|list }}{{ 'abc'|reverse }}{{ 'abc'|list }}{{ lst|first }}{{ lst|last }}{{ []|first }}{{ 'abc'|first }}{{ 'abc'|last }}
====
{{ '42'|int }}{{ '4.7'|int }}{{ 'x'|int }}{{ 'x'|int(5) }}{{ 3.9|int }}{{ '1.5'|float }}{{ 'x'|float }}{{ none|int }}{{ true|int }}{{ '-3'|int }}{{ ' 12 '|int }}
====
{{ 2.5|round }}{{ 3.5|round }}{{ 2.675|round(2) }}{{ 42.55|round(1,'floor') }}{{ 42.51|round(1,'ceil') }}{{ 7|round }}{{ 1234.5|round(-2) }}
====
{{ 'a\nb\n\nc'|indent }}|{{ 'a\nb\n\nc\n'|indent(2, true) }}|{{ 'a\nb\n\nc'|indent(2, false, true) }}|{{ 'a\nb'|indent('> ') }}
====
{{ [1,2,3,4,5]|batch(2)|list }}{{ [1,2,3]|batch(2,'x')|list }}{{ 'the quick brown'|wordcount }}{{ '<a&"b\'>'|e }}{{ '<a>'|safe }}
====
{{ 1 is odd }}{{ 2 is even }}{{ 6 is divisibleby 3 }}{{ 6 is divisibleby(4) }}{{ none is none }}{{ true is true }}{{ 1 is true }}{{ 1 is number }}{{ true is number }}{{ true is integer }}{{ 1.0 is float }}{{ 'a' is string }}{{ d is mapping }}{{ lst is sequence }}{{ d is sequence }}{{ 'a' is iterable }}{{ 1 is iterable }}{{ 1 is sameas 1 }}{{ 'a' is in 'abc' }}{{ 1 is in lst }}{{ 1 is eq 1 }}{{ 1 is lt 2 }}{{ 'a' is lower }}{{ 'A' is upper }}{{ range is callable }}{{ true is boolean }}{{ 'upper' is filter }}{{ 'odd' is test }}{{ nope is iterable }}{{ nope is sequence }}{{ 1 is not string }}{{ not 1 is string }}{{ (1,2) is sequence }}{{ d.items() is sequence }}{{ d.items() is iterable }}
====
{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 'a' < 'b' }}{{ [1,2] < [1,3] }}{{ 1 == 1.0 }}{{ true == 1 }}{{ 'a' == 1 }}{{ [1,{'a':2}] == [1,{'a':2}] }}{{ (1,) == [1] }}{{ 1 != 2 }}{{ 1 >= 1 }}{{ 2 <= 1 }}
====
{{ 1 < 'a' }}
====
{{ 1 in [1,2] and not 3 in [1,2] }}{{ 3 not in [1,2] }}{{ 'ell' in 'hello' }}{{ 1 in 'a' }}
====
{{ 1 in 5 }}
====
{{ 'a' if n == 7 else 'b' }}{{ 'a' if n == 8 }}{{ 'x' if false else 'y' if false else 'z' }}{{ (none or 'o') ~ (1 and 2) ~ (0 or '') ~ ('' and 1) }}
====
{{ 'a' 'b' "c" }}{{ "tab\there\x41\u00e9\U0001F600\101\q\\ \'" }}{{ 'line
two' }}
====
{{ 'ab' * 3 }}{{ [1] * 2 }}{{ [1] + [2] }}{{ (1,) + (2,) }}{{ 3 * 'x' }}{{ 'a' + 'b' }}
====
{{ 'a' + 1 }}
====
{{ 1 / 0 }}
====
{{ range(3)|list }}{{ range(1,4)|list }}{{ range(5,0,-2)|list }}{{ range(3)|length }}{{ range(10)[3] }}{{ range(0)|list }}
====
{{ range(1000000)|length }}
====
{{ dict(a=1, b=2) }}{{ dict([('x',1)]) }}{{ dict({'q':1}, w=2) }}
====
{{ raise_exception('boom ' ~ n) }}
====
{{ strftime_now('%Y-%m-%d %d %b %B %a %A %H:%M:%S %y %j %p %I') }}
====
{{ lst.append(4) }}
====
{{ d.update({'z':1}) }}
====
{% do lst %}
====
{% include 'x' %}
====
{% if n %}{% endfor %}
====
{% if n %}x
====
{{ n
====
{{ 'abc }}
====
{{ n|nofilter }}
====
{{ n is notest }}
====
{% if false %}{{ n|nofilter }}{% endif %}ok
====
{{ txt.nomethod() }}
====
{{ n() }}
====
{{ n }
====
{% for a, b in [(1,2),(3,4)] %}{{ a }}{{ b }}{% endfor %}{% for a in [] %}{% else %}E{% endfor %}{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set t = 1, 2 %}{{ t }}
====
{% for a, b in [(1,2,3)] %}{% endfor %}
====
{% for c in 'héy' %}{{ c }}.{% endfor %}{% for k in d %}{{ k }}{% endfor %}
====
{% for x in 5 %}{% endfor %}
====
{% for i in range(3) %}{{ loop.cycle('a','b') }}{% for j in range(2) %}{{ loop.depth }}{{ loop.index }}{% endfor %}{% endfor %}
====
{{ {'a': {'b': [1, {'c': 2}]}}.a.b[1]['c'] }}{{ {'a':1,}['a'] }}{{ [1,2,].0 }}{{ lst.1 }}
====
{% generation %}gen {{ n }}{% endgeneration %} after
====
{% if n is defined and n > 5 or false %}A{% elif n == 3 %}B{% else %}C{% endif %}
====
{{ messages|length - 1 }}{{ (messages|length - 1) - 2 }}{{ not messages }}{{ messages[-1].role == 'tool' and true }}
====
{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ add_generation_prompt }}{{ documents }}{{ tools is not none }}{{ none_v }}
====
{{ f }}{{ f * 2 }}{{ 1e16 }}{{ 1e15 }}{{ 123456789.123 }}{{ 0.1 + 0.2 }}{{ 1e-5 }}{{ 0.0001 }}{{ 1/3 }}{{ 100.0 }}{{ 1e22 }}{{ -1.5 }}{{ 3.0 }}
====
{{ 'x'.join([]) }}{{ "%s" }}{{ '{}' }}{{ '{{ }}' }}{% raw %}{% if %}{% endraw %}
====
{{ 9223372036854775807 }}{{ -9223372036854775807 - 1 }}
====
{%- for m in messages -%}{{- m.role -}}{%- endfor -%}   {{- 'x' -}}   y
====
{{ [1,2,3] | map('string') | join('-') }}{{ lst | map('tojson') | list }}{{ [' a '] | map('trim') | first }}
====
{% set x = namespace() %}{% set x.a = [1] %}{% set x.a = x.a + [2] %}{{ x.a }}{{ x.a|length }}
====
{% for m in messages[1:] %}{% set role = 'R' if m.role == 'user' else m['role'] %}{{ role }}{% endfor %}{{ role }}
====
{{ ('a' ~ 'b') | upper ~ 'c' }}{{ 'a' ~ 'b' | upper }}{{ -1|abs }}{{ 3 - 1 | string | int }}
====
{{ messages[1].content|tojson }} {{ messages[1].content }} {{ [messages[1].content] }} {{ [messages[2].content] }}
====
{% if messages[0]['role'] == 'system' %}{% set sysm = messages[0]['content'] %}{% set rest = messages[1:] %}{% endif %}{{ sysm }}{{ rest|length }}
====
{{ lst|join(', ') if lst else 'none' }}{{ lst.index(1) }}{{ lst.count(3) }}{{ (lst + [1])|unique|list|length }}
====
{{ {'a':1} == {'a':1.0} }}{{ {} == [] }}{{ none == false }}{{ '' == none }}{{ [] == [] }}
====
{{ 5 if n > 3 and (txt|length > 3) }}{{ txt[:3] ~ '...' if txt|length > 3 else txt }}
====
{{ ns }}{% set ns = 4 %}{{ ns }}
====
a
{% if true %}b{% endif %}
c
   {{ n }}
  {# x #}
d
====
{{ loop }}
====
{%if true%}x{%endif%}{{n}}{%- if n-%} y {%-endif-%}
====
{{ "\n" }}{{ '\n' | length }}{{ "\\n" }}{{ 'a\
b' }}
====
{{ not not true }}{{ not false and true }}{{ - - 3 }}{{ +3 }}{{ not none }}
====
{{ 'ÀÉ straße ПРИВЕТ'.lower() }}{{ 'àé привет'|upper }}{{ 'éa ña'.title() }}
====
{{ messages.0.role }}{{ messages[n - 7].role }}
====
{{ (1, 2) }}{{ (1) }}{{ () }}{{ 1, 2 }}
====
{% set a = [] %}{% for i in range(3) %}{% set a = a + [i] %}{% endfor %}{{ a }}{% set ns = namespace(l=[]) %}{% for i in range(3) %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.l }}
""".strip("\n").split("\n====\n")


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--count", type=int, default=8, help="conversations per style")
    args = args.parse_args()
    rng = random.Random(args.seed)
    out = lambda x: sys.stdout.write(json.dumps(x, ensure_ascii=False) + "\n")
    out({"messages": SNIPPET_MESSAGES, "tools": TOOLS, "variables": SNIPPET_VARIABLES})
    for template in STYLES:
        out({"template": template})
        for _ in range(args.count):
            messages, tools = conversation(rng)
            case = {"messages": messages, "prompt": rng.random() < 0.5}
            if tools:
                case["tools"] = tools
            if rng.random() < 0.3:
                case["variables"] = {"enable_thinking": rng.random() < 0.5}
            out({**case, **render(case, template)})
    for template in SNIPPETS:
        case = {"messages": SNIPPET_MESSAGES, "tools": TOOLS, "prompt": True, "variables": SNIPPET_VARIABLES}
        out({"template": template})
        out({"snippet": True, **render(case, template)})


if __name__ == "__main__":
    main()
