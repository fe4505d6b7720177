# Everything that is done with this repository goes through here; `make help`
# lists it. Needs Go, make, gcc and git; the rest is installed where that is
# possible (as root, on Debian and Ubuntu) and named where it is not.

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:

VERSION  := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
BUILD    := -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)'

# Binaries carry no libc, so that one build runs on every distribution.
export CGO_ENABLED := 0

GOLANGCI_LINT      := v2.15.0
GOVULNCHECK        := v1.9.0
PROTOC_GEN_GO      := v1.36.12
PROTOC_GEN_GO_GRPC := v1.6.2
TOOLS := bin/tools

# Flags of `make bench`, such as -quick or '-only two-hops'; see bin/bench -help.
BENCH ?= -write docs/benchmarks.md

# Flags of `make bench-server`, such as -quick or '-only writes'; see
# bin/bench-server -help.
BENCH_SERVER ?= -write docs/benchmarks-server.md

# How long each fuzz target runs in `make fuzz`.
FUZZTIME ?= 20s
# How long `make soak` runs.
SOAKTIME ?= 30m
# How often `make fault` runs each row, each time with another seed; how long a row
# goes on breaking things (as short as it can be); and which rows those are.
FAULTRUNS ?= 1
FAULTTIME ?=
FAULT     ?= .
# What `make test-unit`, `make race` and `make lint` look at.
PKGS ?= ./...

# Test packages that run real programs, one package at a time, in network
# namespaces: they need root.
ROOT_TESTS := tests/e2e tests/fault
# What `make test` runs, in this order.
SUITES := setup build vet test-arch test-unit test-conformance test-e2e test-fault test-docs
# Lists the rest but tests/arch and tests/docs. Those have targets of their own:
# they build programs, which go test's cache knows nothing of.
UNIT = go list $(PKGS) | grep -v -E '/tests/(e2e|conformance|fault|bench|arch|docs)(/|$$)'

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: build ## run the whole mesh on this machine, with two demo applications
	exec bin/meshd dev --demo

.PHONY: build
build: ## build the programs into bin/
	go build $(BUILD) -o bin/ ./cmd/...

.PHONY: test
test: ## install what is missing, then pass every test; says how long each suite took
	@times=; trap 'printf "\n%s" "$$times"' EXIT; \
	for suite in $(SUITES); do \
		begun=$$SECONDS; status=0; \
		$(MAKE) --no-print-directory "$$suite" || status=$$?; \
		times+=$$(printf 'test: %-18s %2d min %2d s' "$$suite" $$(((SECONDS - begun) / 60)) $$(((SECONDS - begun) % 60)))$$'\n'; \
		if ((status)); then times+="test: $$suite failed"$$'\n'; exit $$status; fi; \
	done; \
	if [[ $$(id -u) == 0 ]]; then times+=$$'test: everything passed\n'; \
	else times+=$$'test: everything passed but what needs root, which was left out: $(wildcard $(ROOT_TESTS))\n'; fi

.PHONY: check
check: lint gen-check test race ## all that a change must pass

.PHONY: setup
setup: ## install the programs that the tests run (as root; else name them)
	@tests/setup/tools.sh test || { status=$$?; [[ $$status == 3 && $$(id -u) != 0 ]] || exit $$status; }

.PHONY: vet
vet: ## go vet
	go vet $(PKGS)

.PHONY: test-arch
test-arch: ## hold the code and docs/ARCHITECTURE.md equal
	go test -count=1 ./tests/arch/...

.PHONY: test-unit
test-unit: ## the tests of every package; needs no root
	packages=$$($(UNIT)); go test -timeout 10m $$packages

.PHONY: e2e
e2e: setup build test-conformance test-e2e ## end to end: network namespaces, real programs (root)

.PHONY: conformance
conformance: ## h2spec, gRPC's interoperability suite, and what no client should send
	go test -count=1 -v ./tests/conformance/...

.PHONY: test-conformance
test-conformance:
	go test -count=1 ./tests/conformance/... ./tests/bench/...

.PHONY: test-e2e test-fault
test-e2e test-fault: test-%:
	@if [[ $$(id -u) != 0 ]]; then echo "test: left out, as network namespaces need root: tests/$*"; exit; fi; \
	set -x; go test -count=1 -p 1 -timeout 20m ./tests/$*/...

.PHONY: fault
fault: setup ## break servers, networks and disks; FAULTRUNS=20, FAULTTIME=10m, FAULT=TestName (root)
	@mkdir -p bin/fault
	FAULTRUNS='$(FAULTRUNS)' FAULTTIME='$(FAULTTIME)' go test -count=1 -p 1 -timeout 0 -v -artifacts -outputdir "$$PWD/bin/fault" -run '$(FAULT)' ./tests/fault/...

.PHONY: soak
soak: setup ## mixed load with a plan change each second, for SOAKTIME (30m); nothing may grow (root)
	SOAKTIME='$(SOAKTIME)' go test -count=1 -timeout 0 -v -run '^TestSoak$$' ./tests/e2e

.PHONY: test-docs
test-docs: ## parse or run every snippet of the documentation
	go test -count=1 ./tests/docs/...

.PHONY: race
race: ## every package under the race detector
	packages=$$($(UNIT)); CGO_ENABLED=1 go test -race -timeout 20m $$packages

.PHONY: fuzz
fuzz: ## run each fuzz target for FUZZTIME (20s), one at a time
	@mkdir -p bin
	@go test -list '^Fuzz' $(PKGS) >bin/fuzz.list || { cat bin/fuzz.list; exit 1; }
	@awk '/^Fuzz/ { names[n++] = $$1 } \
		/^ok/ { for (i = 0; i < n; i++) print $$2, names[i]; n = 0 }' bin/fuzz.list | \
	{ count=0; while read -r package target; do \
		echo "fuzz: $$target in $$package"; \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime '$(FUZZTIME)' -fuzzminimizetime 10x "$$package" </dev/null; \
		count=$$((count + 1)); \
	done; echo "fuzz: $$count targets passed"; }

.PHONY: bench
bench: build ## measure mesh-proxy beside HAProxy, Envoy, nginx (BENCH=-quick)
	@tests/setup/tools.sh bench || [[ $$? == 3 ]] # who is missing stands in the report
	go build $(BUILD) -o bin/bench ./tests/bench
	exec bin/bench $(BENCH)

.PHONY: bench-server
bench-server: build $(TOOLS)/etcd ## measure the servers beside etcd and bare Raft (BENCH_SERVER=-quick)
	go build -o bin/bench-server ./tests/bench/server
	exec bin/bench-server $(BENCH_SERVER)

# A module of its own says which version: distributions have older ones.
ETCD := tests/bench/server/etcd
$(TOOLS)/etcd: $(ETCD)/go.mod $(ETCD)/go.sum $(ETCD)/main.go
	@mkdir -p $(@D)
	go -C $(ETCD) build -trimpath -buildvcs=false -o $(CURDIR)/$@ .

.PHONY: lint
lint: $(TOOLS)/golangci-lint-$(GOLANGCI_LINT) ## golangci-lint, go vet, go.mod in order
	go mod tidy -diff
	go vet $(PKGS)
	$< run $(PKGS)

.PHONY: fmt
fmt: $(TOOLS)/golangci-lint-$(GOLANGCI_LINT) ## format the code as lint wants it
	$< fmt

.PHONY: vuln
vuln: $(TOOLS)/govulncheck-$(GOVULNCHECK) ## look for known vulnerabilities (asks vuln.go.dev)
	$< $(PKGS)

.PHONY: gen
gen: $(TOOLS)/protoc-gen-go-$(PROTOC_GEN_GO) $(TOOLS)/protoc-gen-go-grpc-$(PROTOC_GEN_GO_GRPC) ## generate code from the .proto files of server/meshpb
	@tests/setup/tools.sh gen
	protoc \
		--plugin=protoc-gen-go=$(TOOLS)/protoc-gen-go-$(PROTOC_GEN_GO) \
		--plugin=protoc-gen-go-grpc=$(TOOLS)/protoc-gen-go-grpc-$(PROTOC_GEN_GO_GRPC) \
		--go_out=. --go_opt=paths=source_relative \
		--go-grpc_out=. --go-grpc_opt=paths=source_relative \
		server/meshpb/*.proto

.PHONY: gen-check
gen-check: gen ## fail if generated code differs from what is committed
	git diff --exit-code -- server/meshpb

.PHONY: clean
clean: ## remove what was built, the tools too
	rm -rf bin

# A tool's file carries its version, so that a new pin builds a new one and an
# old one is kept over `git switch`. $(1) name, $(2) version, $(3) package.
define tool
$(TOOLS)/$(1)-$(2):
	@mkdir -p $(TOOLS)/$(1).tmp
	GOBIN=$$(CURDIR)/$(TOOLS)/$(1).tmp GOFLAGS= go install $(3)@$(2)
	@mv $(TOOLS)/$(1).tmp/$(1) $$@
	@rmdir $(TOOLS)/$(1).tmp
endef
$(eval $(call tool,golangci-lint,$(GOLANGCI_LINT),github.com/golangci/golangci-lint/v2/cmd/golangci-lint))
$(eval $(call tool,govulncheck,$(GOVULNCHECK),golang.org/x/vuln/cmd/govulncheck))
$(eval $(call tool,protoc-gen-go,$(PROTOC_GEN_GO),google.golang.org/protobuf/cmd/protoc-gen-go))
$(eval $(call tool,protoc-gen-go-grpc,$(PROTOC_GEN_GO_GRPC),google.golang.org/grpc/cmd/protoc-gen-go-grpc))
