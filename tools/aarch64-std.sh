#!/usr/bin/env bash
# aarch64-std.sh [--debian]
#
# Makes sure that Rust's standard library for aarch64-unknown-linux-gnu is there, and prints the settings to eval before
# `cargo check --target aarch64-unknown-linux-gnu`. Takes it from rustup; where rustup has none or cannot reach its
# server, or with --debian, takes a whole compiler from Debian's `rustc-web`, because a standard library works with no
# compiler but the one it was built by. It is unpacked, not installed, into ${XDG_CACHE_HOME:-$HOME/.cache}/aarch64-std:
# the package may not be installed beside Debian's rustup.
set -euo pipefail

TARGET=aarch64-unknown-linux-gnu
say() { printf 'aarch64-std: %s\n' "$*" >&2; }

debian=0
case ${1:-} in
  '') ;;
  --debian) debian=1 ;;
  *) say "unknown argument $1"; exit 2 ;;
esac

if [ "$debian" = 0 ]; then
  if [ -d "$(rustc --print sysroot)/lib/rustlib/$TARGET/lib" ]; then
    say "already installed"
    exit 0
  fi
  # A server that cannot be reached should not cost more than the other way takes.
  if command -v rustup > /dev/null && timeout 120 rustup target add "$TARGET" >&2; then
    exit 0
  fi
  say "rustup gave no standard library for $TARGET; taking the compiler from Debian"
fi

[ "$(uname -m)" = x86_64 ] || { say "Debian's packages are taken for an x86_64 host only"; exit 1; }
root=${XDG_CACHE_HOME:-$HOME/.cache}/aarch64-std
if [ ! -x "$root/rustc" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/lists/partial" "$work/deb" "$work/root"
  mkdir -p "$work/cache/archives/partial"
  # Lists and cache of our own, so that nobody else comes to know of a second architecture.
  options=(-q -o APT::Architecture=amd64 -o APT::Architectures::=amd64 -o APT::Architectures::=arm64
    -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
  # The package that PACKAGE depends on and whose name, with its version, begins with PREFIX.
  dependency() { # PACKAGE PREFIX
    apt-cache "${options[@]}" depends "$1" | awk -v prefix="$2" '
      $1 == "Depends:" && index($2, prefix) == 1 && substr($2, length(prefix) + 1) ~ /^[0-9.]+$/ { name = $2 }
      END { if (name == "") exit 1; print name }'
  }
  apt-get "${options[@]}" update >&2
  library=$(dependency libstd-rust-web-dev libstd-rust-web-)
  llvm=$(dependency "$library" libllvm)
  (cd "$work/deb" && apt-get "${options[@]}" download rustc-web "$library" "$llvm" \
    libstd-rust-web-dev:amd64 libstd-rust-web-dev:arm64 >&2)
  for package in "$work"/deb/*.deb; do dpkg -x "$package" "$work/root"; done
  cat > "$work/root/rustc" << 'WRAPPER'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$root/usr/bin/rustc" --sysroot "$root/usr" "$@"
WRAPPER
  chmod 755 "$work/root" "$work/root/rustc"
  mkdir -p "$(dirname "$root")"
  rm -rf "$root"
  mv "$work/root" "$root"
fi
say "$("$root/rustc" --version), in $root"
# What another compiler made may not be mixed with what this one makes.
printf 'export RUSTC=%q CARGO_TARGET_DIR=%q\n' "$root/rustc" "${CARGO_TARGET_DIR:-target}/debian-rustc"
