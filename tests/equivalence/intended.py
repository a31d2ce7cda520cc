"""Differences between the old build and this tree that are meant to be, each with its reason.

Words are not compared unless `--words` is given: all messages were rewritten. An entry that matches nothing in its
suite is stale and fails the harness: remove it.
"""

from __future__ import annotations

from tests.equivalence.comparing import Intended

INTENDED: tuple[Intended, ...] = (
    Intended("Records are written with schema version 2.", "results show", r"schema_version$", suite="recorded"),
    Intended("Reasons are codes with data beside their sentences.", "results show", r"_coded\b", suite="recorded"),
    Intended(
        "The energy that counts is shown whichever meter it comes from: joules, and joules per output token.",
        "interrupted/results: lem results show",
        r"\+2\d\.\d\d \+0\.3\d{3}",
        suite="recorded",
    ),
    Intended(
        "An export in Markdown has a column for the energy of the CPU where that is the energy that counts.",
        "(interrupted|synthetic-rough)/export: lem results export",
        r"\+\d+\.\d+( \+\d+\.\d+)*",
        suite="recorded",
    ),
    Intended(
        "What ±5 % between cards means is explained only where a board's sensor was read; what is left of the run is "
        "counted as lem status counts it, and p95 and p99 need more prompts.",
        "interrupted/report: lem report",
        r"-5 \+4 -1 -1 -3 -8 \+0 \+5 -1 -20 \+100 -100 \+500 -±5 -5 -10",
        suite="recorded",
    ),
    Intended(
        "Slowdowns that overlap are one spell; running at the power limit is none.",
        "synthetic-rough/report: lem report",
        r"-2 \+1 -1",
        suite="recorded",
    ),
    Intended(
        "p95 needs 100 different prompts and p99 500, where 20 and 100 observations were enough.",
        "lem report",
        r"-20 \+100 -100 \+500( -20 \+100 -100 \+500)*",
        suite="recorded",
    ),
    Intended(
        "The environment of a report has the settings of the machine and its GPUs.",
        "lem report",
        r"^elements\.(tr|th|td)$",
        suite="recorded",
    ),
    Intended("The size of a page, whose words were rewritten.", "lem report", r"^\$\.bytes$", suite="recorded"),
    Intended(
        "What was interrupted is left, not failed.", "results list", r"^\$\[\d+\]\.(left|failed)$", suite="recorded"
    ),
    Intended(
        "As above, in a table: the column of what is left.", "results list", r"(-1 )?\+0( \+\d+)*", suite="recorded"
    ),
    Intended(
        "As above: no cycle of it was lost by a failure.", "interrupted/results: lem check", r".+", suite="recorded"
    ),
    Intended("A description of one word got more.", "config (schema|fields)", r"health_check.*\.enabled\.description$"),
    Intended(
        "The values that fp_precision accepts are listed in another order.",
        r"corpus/(30|267): lem config validate",
        r"^\$\[0\]\.problems\[(0|17)\]\.message$",
    ),
    Intended("As in recorded scenes: schema version 2.", "", r"schema_version$", suite="live"),
    Intended("As in recorded scenes: codes beside sentences.", "", r"_coded\b", suite="live"),
    Intended("The manifest has a checksum, and those of its results.", "", r"sha256$", suite="live"),
    Intended("The example in a hint is 5%, not 2%.", "--until ci=2", r"-2 \+5"),
    # Issue 12
    Intended(
        "The index that a run has beside its results.", "", "kind", part=r"^file .*/index\.jsonl$", suite="recorded"
    ),
    Intended("lem check, results list and show read what is left from manifests.", r"help/(check|results-)", "options"),
    Intended(
        "Containers have a read-only root and model cache, and limits that an overlay can change.",
        "compose",
        r"(mem_limit|cpus|pids_limit|pids|memory|read_only|tmpfs.*|HF_\w+|LEM_MODEL_CACHE_READ_ONLY)$",
    ),
    # Issue 13
    Intended(
        "Options for interference, service levels, overload and the unit of an external meter.",
        "",
        r"allow_overload|\.slo\b|max_wait_pct|max_foreign_pct|external_unit",
    ),
    Intended("A preset for AI Energy Score.", "presets|schema|fields", r"ai-energy-score"),
    Intended("lem doctor looks for interference before a run.", "machine: lem doctor", r"^\$\.checks|(\+\S+ ?)+"),
    Intended("As above, in the text of a resolved experiment.", "lem experiment", r"\+2 \+20\.0 \+20\.0"),
    Intended("As above, and the preset, in the list of options.", "config fields", r"\+0 \+0 \+2 \+0 \+20 .+"),
    Intended("As above, in the list of presets.", "lem presets", r"\+2048 \+10 \+0\.1 \+1 \+000 \+10"),
    Intended("As above, in a new configuration file.", "lem config new", "commented out"),
    Intended("The hint for an unknown metric no longer lists them all.", "--until ci=1%:none", r"(-\d+ ?)+"),
    Intended("A missing bundle is named instead of the file SHA256SUMS in it.", "lem bundle verify", "-256"),
    Intended(
        "Records, and exports of them, have more: in flight, lag, uncertainty, goodput, steps, machine, interference.",
        "results (show|export)",
        "",
        suite="recorded",
        is_new=True,
    ),
    Intended("ICL is in place of ITL.", "results (show|export)", r"\bitl_", suite="recorded"),
    Intended(
        "lem results recompute counts only what it recomputed.",
        "results recompute",
        r"compared$|^([-+]\d+ ?)+$",
        suite="recorded",
    ),
    Intended(
        "What was interrupted is left, not failed.", "(compare interrupted|results show)", "n_failed$", suite="recorded"
    ),
    # Issue 14
    Intended(
        "The hint for an unknown metric no longer lists them all.",
        "lem compare .*--gate none",
        r"(-\d+ ?)+",
        suite="recorded",
    ),
    Intended(
        "lem compare --json has a ratio for every comparable metric.",
        "lem compare",
        r"^\$\.pairs\[\d+\]\.metrics\.",
        suite="recorded",
        is_new=True,
    ),
    Intended(
        "The report has net energy per request, and phases and CPU energy per token instead of joules.",
        "lem report",
        r"^elements$|([-+]\S+ ?)+",
        suite="recorded",
    ),
    Intended(
        "An interval is computed in another order, which changes its last digit.",
        "interrupted/results: lem results show",
        r"energy_per_total_tok_j\.t_log\.ci_(lower|upper)$",
        suite="recorded",
    ),
    Intended(
        "Net energy of older records had another rule and is not compared, which a message says.",
        "synthetic-.*: lem results recompute",
        r"^\$\.results\[\d+\]\.(differences\[(energy|gpus)\S*gpu_energy_net_j\]\.|message\b)",
        suite="recorded",
    ),
    Intended(
        "As above, in text: the net energy goes, fewer figures count, and their sum is told; results without raw data "
        "do not agree with them.",
        "synthetic-.*: lem results recompute",
        r"-46 \+3\d( -[\d.]+){1,2}( -46 \+3\d( -[\d.]+){1,2})*( -\d+ \+0)? \+\d+",
        suite="recorded",
    ),
    Intended(
        "A result in full has its net energy, and the settings of the machine and its GPUs.",
        r"(h200|synthetic-.*)/results: lem results show \S+/\S+$",
        r"\+[\d.]+( \+[\d.]+)*",
        suite="recorded",
    ),
    Intended(
        "Configurations without a complete result are named as they are found, not by the alphabet.",
        "synthetic-rough/results: lem check demo --json",
        r"^\$\.findings\[0\]\.configurations\[[01]\]$",
        suite="recorded",
    ),
    Intended(
        "What was interrupted is left, not failed, and counted in a line of its own.",
        "interrupted/results: lem results show",
        r"-1 \+0 \+\d+",
        suite="recorded",
    ),
    Intended(
        "The status has the hash that identifies a configuration.",
        "lem status",
        r"\.config_hash$",
        suite="recorded",
        is_new=True,
    ),
    Intended(
        "An obstacle has a code, and may be a confounder; removed configurations are listed.",
        "lem compare",
        r"obstacles\[\d+\]\.(code|is_confounder)$|^\$\.removed$",
        suite="recorded",
        is_new=True,
    ),
    Intended(
        "Another power limit is named, here beside another GPU.",
        "synthetic-two-cards/compare: lem compare",
        r"obstacles\[\d+\]\.(text|is_blocking)$",
        suite="recorded",
        is_new=True,
    ),
    Intended(
        "A time limit changes no number, so it is no setting.",
        "lem compare",
        r"settings\.warmup\.timeout_seconds$",
        suite="recorded",
    ),
    Intended("lem gpus --probe has a Python put work on GPUs.", r"help/(gpus|worker)", "options"),
    # Issue 14
    Intended(
        "Gates are strict: --lenient is the option now, and a campaign may name its gates.",
        r"help/(lem|campaign|compare|report): ",
        "options",
    ),
    Intended(
        "`balanced` is an order of experiments, and the default.", "schema|fields", r"structure\.(enum|choices|default)"
    ),
    Intended(
        "The dry run shows what the planned cycles can detect.",
        "--dry-run",
        r"^\$\.detectable\b",
        is_new=True,
    ),
    Intended("As above, in text.", "--dry-run", r"\+\S+( \+\S+)*"),
    # Issue 15
    Intended(
        "What leaves no experiment is shown at the option or at the first entry.",
        r"corpus/(6|251): lem config validate",
        r"^\$\[0\]\.problems\[0\]\.(line|column|key)$",
    ),
    Intended(
        "The dry run reports folders, packages and images that are missing.",
        "lem campaign .*--dry-run",
        r"^\$\.problems\b",
        is_new=True,
    ),
    Intended("Prompts of alpaca and mmlu have the input and the choices.", "lem datasets --json", r"\.column$"),
    Intended("Help with figures of the new options.", "lem completion (zsh|fish)", r"\+\d( \+\d)*"),
    Intended(
        "As above, where the balanced order is another one than the old default.",
        r"campaign .*--dry-run(?!.*--json)",
        r"(-\d+ )?(\+\d+ )?(\+256 )?\+[\d.]+ \+80 \+\d+ \+[\d.]+ \+\d+ \+\d+ "
        r"\+\d+ \+1 \+\d+ \+2 \+\d+ \+3 \+\d+ \+5 \+[\d.]+ \+0\.5( \+1)?( [+-]\d+)*",
    ),
    Intended("`balanced` is the default order in a resolved campaign.", "config show", r"execution\.structure$"),
    Intended(
        "Experiments of a plan run in a balanced order.",
        "lem campaign .*(--dry-run|--validate-only).*--json",
        r"^\$\.experiments\[\d+\]\.(exp_id|config_name|backend|loads_engine)$",
    ),
    Intended(
        "Without prompts, the synthetic set is as large as the widest configuration needs.",
        "lem experiment .*--dry-run --json",
        r"^\$\.config\.prompts\b",
    ),
    Intended(
        "As above, in the table of the plan, with what it can detect.",
        r"docs/grid\.yaml: lem campaign grid\.yaml --dry-run --executor local$",
        r"([-+]\S+ ?)+",
    ),
    Intended(
        "Tables begin with numbers and axes, and a comparison has all metrics in one; the values are in its JSON.",
        "lem (compare|results show)",
        r"^[-+].*",
        suite="recorded",
    ),
    Intended(
        "Configurations have numbers and axes; a comparison may be along an axis.",
        "lem (compare|results show|check)",
        r"\.(number|numbers|axes)\b|^\$\.(along|interval_confidence|is_same_order)$",
        suite="recorded",
        is_new=True,
    ),
    Intended(
        "The answer names configurations with their numbers, and intervals hold together.",
        "lem compare",
        r"^\$\.sentence$|\.ci_(lower|upper)$",
        suite="recorded",
    ),
    Intended(
        "The report has the ratios and the baseline of lem compare, and configurations in the order of their numbers.",
        "lem report",
        r"^[-+].*|^elements\.",
        suite="recorded",
    ),
    Intended(
        "lem compare --by and the numbers of configurations are in the help.", "help/(compare|results|report)", ".+"
    ),
    Intended(
        "Gates are strict: inconclusive is 4, and a metric that was not measured is 2, with a message.",
        "lem compare .*--gate",
        r"^\$$|^\$\.exit_code$|is empty",
        suite="recorded",
    ),
    Intended(
        "Drift, effects of the place and unsteady windows have stated rates of false alarms; lost cycles are counted.",
        "lem check",
        r"^\$\.findings|^\$\.weak$|^\$$|^[-+].*",
        suite="recorded",
    ),
    Intended(
        "A value of zero drops one cycle's ratio, and exclusions that cost no cycle withhold no verdict.",
        "/compare: lem compare",
        r"\.(reason|further_cycles|n_failed|n_compared|p_holm)$",
        suite="recorded",
    ),
    Intended("lem alone shows how to start.", "help/lem: lem $", r"^\$$|is empty"),
    Intended("lem experiment needs no file, and its hint names a model.", "help/experiment: lem experiment$", r"\+2"),
    Intended(
        "-o is short for --results-dir in two commands, and for --output in two.", "help/(doctor|merge): ", "options"
    ),
    Intended(
        "The plan shows one cycle, with the numbers of configurations, and how the others differ.",
        "lem campaign .*--dry-run",
        r"([-+]\S+ ?)+",
        part="stdout",
    ),
    Intended(
        "Exports are flat and their hashes are no numbers; a CSV has no columns without a value.",
        "lem results export",
        r"^[-+].*|^\$",
        suite="recorded",
    ),
    Intended("Hashes begin with h.", "lem (compare|results show)", r"\.config_hash$", suite="recorded"),
    Intended(
        "A command that has finished suggests the next one on stderr, with the numbers that were typed.",
        "lem (-|config validate|doctor|campaign)",
        r"is empty|(\+\S+ ?)+",
        part="stderr",
    ),
    Intended("As above.", "lem (compare|results show|check|merge)", r"is empty|(\+\S+ ?)+", "stderr", "recorded"),
)
