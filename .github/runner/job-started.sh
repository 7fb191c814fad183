#!/usr/bin/env bash
# Runs on the H100 machine before every job (ACTIONS_RUNNER_HOOK_JOB_STARTED) and refuses what must not run there.
# A copy outside the checkout is installed by hand (docs/runner.md), so that no pull request can change it.
# SONICMOE_RUNNER_REPOSITORY, in the runner's .env file, is the one repository whose code may run.
set -euo pipefail

refuse() {
    echo "job refused by this machine: $1" >&2
    exit 1
}

[ "${GITHUB_REPOSITORY:-}" = "${SONICMOE_RUNNER_REPOSITORY:?not set in the .env file of the runner}" ] ||
    refuse "repository '${GITHUB_REPOSITORY:-}' is not $SONICMOE_RUNNER_REPOSITORY"
case "${GITHUB_EVENT_NAME:-}" in
push | merge_group | workflow_dispatch) ;;
pull_request)
    head=$(python3 -c 'import json, sys; print((json.load(open(sys.argv[1]))["pull_request"]["head"]["repo"] or {}).get("full_name"))' \
        "${GITHUB_EVENT_PATH:?}")
    [ "$head" = "$GITHUB_REPOSITORY" ] || refuse "the pull request comes from the fork $head"
    ;;
*) refuse "event '${GITHUB_EVENT_NAME:-}' is not push, merge_group, workflow_dispatch or pull_request" ;;
esac
