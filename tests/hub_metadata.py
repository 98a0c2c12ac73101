"""The metadata checks of the Hub, for the loopback server: what it refuses with 400, and in which words."""

import math
import re
from typing import Any

import yaml


YAML_BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
REPO_ID = re.compile(r"^(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*$")
# Identifiers of https://huggingface.co/docs/hub/repositories-licenses
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr gemma unknown other
"""


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings for a README.md, as `POST /api/validate-yaml` gives them."""
    block = YAML_BLOCK.search(content)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(block.group(2))
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML Metadata Error: metadata must be a mapping"], []
    errors = [*_license_errors(metadata), *_id_errors(metadata), *_text_errors(metadata)]
    return errors + _index_errors(metadata.get("model-index")), []


def _license_errors(metadata: dict[str, Any]) -> list[str]:
    license_id = metadata.get("license")
    if license_id is None:
        return []
    if license_id not in LICENSES.split():
        return [f'"license" must be one of [{", ".join(LICENSES.split()[:3])}, ...], got "{license_id}"']
    if license_id == "other" and "license_name" not in metadata:
        return ['"license_name" is required when "license" is "other"']
    return []


def _id_errors(metadata: dict[str, Any]) -> list[str]:
    errors = []
    for key, kind in (("base_model", "models"), ("datasets", "datasets")):
        values = metadata.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not isinstance(value, str) or not REPO_ID.match(value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co/{kind}.')
    return errors


def _text_errors(metadata: dict[str, Any]) -> list[str]:
    errors = [
        f'"{key}" must be a string'
        for key in ("library_name", "pipeline_tag", "license_name")
        if key in metadata and not isinstance(metadata[key], str)
    ]
    tags = metadata.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    return errors


def _index_errors(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, entry in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            errors.append(f'"{where}.name" is required')
            continue
        for j, result in enumerate(entry.get("results") or []):
            errors += _result_errors(f"{where}.results[{j}]", result)
    return errors


def _result_errors(where: str, result: dict[str, Any]) -> list[str]:
    task, dataset = result.get("task") or {}, result.get("dataset") or {}
    required = {
        "task.type": task.get("type"),
        "dataset.type": dataset.get("type"),
        "dataset.name": dataset.get("name"),
    }
    errors = [f'"{where}.{key}" is required' for key, value in required.items() if not isinstance(value, str)]
    if not result.get("metrics"):
        errors.append(f'"{where}.metrics" is required')
    for k, metric in enumerate(result.get("metrics") or []):
        value = metric.get("value")
        if not isinstance(metric.get("type"), str):
            errors.append(f'"{where}.metrics[{k}].type" is required')
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            errors.append(f'"{where}.metrics[{k}].value" is required')
    return errors
