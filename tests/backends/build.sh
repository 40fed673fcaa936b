#!/usr/bin/env bash
# Builds the servers that `tests/backends` runs, from their Go modules, and says where they are:
#
#     eval "$(tests/backends/build.sh)"
#
# They stay in a cache, a folder per version, with links in one folder for PATH. Without Go, or where a module cannot be
# had, or when the time is up, there is no link for that server, and its tests are skipped. The next call goes on from
# what Go has already compiled.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${GPUSCOPE_BACKENDS:-${XDG_CACHE_HOME:-$HOME/.cache}/gpuscope-backends}
deadline=$((SECONDS + ${GPUSCOPE_BACKENDS_SECONDS:-900}))
collector=$(sed -n 's/^  version: //p' "$here/otelcol.yaml")
export CGO_ENABLED=0 GOFLAGS="${GOFLAGS:-} -buildvcs=false -trimpath"

# In a scratch module of its own: `go install` would build a program, too, but says less when it cannot.
program() { # module version package [flags]
    go mod init gpuscope.test/scratch && go get -tool "$1/$3@$2" && go build -ldflags='-s -w' "${@:4}" -o built "$1/$3"
}

jaeger() { program github.com/jaegertracing/jaeger v1.76.0 cmd/jaeger; }

# Without the discovery of targets in clouds, which is most of it.
prometheus() { program github.com/prometheus/prometheus v0.316.0 cmd/prometheus -tags remove_all_sd; }

otelcol() {
    go run "go.opentelemetry.io/collector/cmd/builder@v$collector" --config="$here/otelcol.yaml" &&
        mv source/otelcol built
}

provide() { # name version
    local place="$cache/$1-$2/$1" scratch left=$((deadline - SECONDS))
    if [ ! -x "$place" ]; then
        command -v go >/dev/null && [ "$left" -gt 0 ] && mkdir -p "${place%/*}" || return
        scratch=$(mktemp -d "$cache/building.XXXXXX") || return
        export here collector
        export -f program "$1"
        if (cd "$scratch" && nice timeout -k 10 "$left" bash -c "$1") >"$cache/$1-$2/log" 2>&1 && [ -x "$scratch/built" ]; then
            mv "$scratch/built" "$place"
        else
            echo "$1 $2 could not be built; the end of $cache/$1-$2/log is:" >&2
            tail -n 3 "$cache/$1-$2/log" >&2
        fi
        rm -rf "$scratch"
    fi
    [ ! -x "$place" ] || ln -sf "$place" "$cache/bin/$1"
}

mkdir -p "$cache/bin" || exit 0
rm -f "$cache/bin/"*
provide jaeger 1.76.0
provide otelcol "$collector"
provide prometheus 0.316.0
printf 'export PATH=%q:$PATH\n' "$cache/bin"
