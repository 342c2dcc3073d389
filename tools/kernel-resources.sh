#!/usr/bin/env bash
# kernel-resources.sh FATBIN TARGET...
#
# Prints what each kernel of FATBIN takes on each target (sm_90a, ...), and fails if one spills, if a target lacks a
# kernel that another has, or if there are none. Anything on a thread's stack is in slow memory and so counts as a
# spill. Needs cuobjdump: on PATH, or where tools/install-cuda-toolchain.sh puts it.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
fatbin=$1
shift
PATH=$PATH:${CUDA_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/cuda-toolchain/13.0}/bin

cuobjdump --dump-resource-usage "$fatbin" | awk -v targets="$*" '
  function value(name) { match($0, name ":[0-9]+"); return substr($0, RSTART + length(name) + 1, RLENGTH - length(name) - 1) }
  function fail(text) { print "kernel-resources: " text > "/dev/stderr"; failed = 1 }
  BEGIN { row = "%-32s %-8s %9s %12s %12s %12s\n"; printf row, "kernel", "target", "registers", "shared B", "stack B", "local B" }
  /^arch = / { target = $3 }
  /^ Function / { kernel = $2; sub(/:$/, "", kernel); kernels[kernel] = 1 }
  /^ +REG:/ {
    found[kernel, target] = 1
    printf row, kernel, target, value("REG"), value("SHARED"), value("STACK"), value("LOCAL")
    if (value("STACK") + value("LOCAL") > 0) fail(kernel " on " target " spills to memory")
  }
  END {
    count = split(targets, wanted, " ")
    for (kernel in kernels) {
      any = 1
      for (i = 1; i <= count; i++) if (!((kernel, wanted[i]) in found)) fail(kernel " is missing for " wanted[i])
    }
    if (!any) fail("no kernels")
    exit failed
  }'
