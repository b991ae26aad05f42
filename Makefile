# The everyday commands. Each installs what is missing first (and says so), builds through CMake's
# presets and runs. `make demo` and `make test` are all a newcomer needs.
SHELL := /bin/bash
JOBS ?= $(shell nproc)
# Extra arguments of the configure step, for instance CMAKE_FLAGS=-DSLUICE_WERROR=ON.
CMAKE_FLAGS ?=
PRESET ?= release
SLUICE := build/$(PRESET)/bin/sluice

.PHONY: demo test bench format clean deps build

demo: build
	$(SLUICE) ask --source demos/clips/parade.mp4 --questions demos/clips/parade.jsonl \
	  --no-dialogue --require-right 5 --stats

test: build
	ctest --preset $(PRESET) -j $(JOBS)

bench: build
	$(SLUICE) bench

format: deps
	git ls-files '*.cc' '*.h' '*.cu' '*.cuh' | xargs clang-format -i

clean:
	rm -rf build

build: deps
	cmake --preset $(PRESET) $(CMAKE_FLAGS)
	cmake --build --preset $(PRESET) -j $(JOBS)

deps:
	@scripts/install-deps.sh
