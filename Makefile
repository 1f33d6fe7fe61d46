# mft - build, test, show and measure. Needs a C compiler and make, nothing else.
#
#   make            tools and examples into build/
#   make demo       fine-tunes the bundled model on the bundled health records and shows what it learned
#   make test       every test, also as C++; larger data in ../shared or $MFT_TEST_DATA is used when it is there
#   make bench      kernels, ops and training steps beside the machine's measured peak
#   make bench-amx-pace   products of the AMX row at about its pace, on an x86-64 with AVX-512 that has none
#   make bench-memory   training: mode x model x peak x tokens/s, as the README has it (MODELS="gpt2 ..", STEPS=n)
#   make sanitize   the tests under the address and undefined-behaviour sanitizers (sanitize-address), those with threads under
#                   the thread sanitizer (sanitize-thread)
#   make fuzz       every parser on its corpus, and FUZZ_SECONDS of new inputs each
#
# RUN goes before every program that is run, for emulators:
#   make test CC=aarch64-linux-gnu-gcc BUILD=build/aarch64 RUN="qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu"

CC      ?= cc
CXX     ?= c++
CFLAGS  ?= -O2 -g
CFLAGS_LIGHT ?= -O1 -g
WARN     = -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes
LIBS     = -lm -lpthread
BUILD   ?= build
RUN     ?=
FUZZ_SECONDS ?= 10
ALL          ?= all
SANITIZE      = -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
FUZZ_FLAGS   ?= -O1 $(SANITIZE)

HEADERS  = mft.h mft_safetensors.h mft_models.h
TESTS    = $(patsubst tests/%.c,$(BUILD)/%,$(wildcard tests/test_*.c))
TESTS_CXX = $(patsubst tests/%.cc,$(BUILD)/%,$(wildcard tests/test_*.cc))
EXAMPLES = $(patsubst examples/%.c,$(BUILD)/%,$(wildcard examples/*.c)) $(patsubst examples/%.cc,$(BUILD)/%,$(wildcard examples/*.cc))
FUZZERS  = $(patsubst tests/fuzz/%.c,$(BUILD)/%,$(wildcard tests/fuzz/fuzz_*.c))

all: $(BUILD)/mft $(EXAMPLES)

$(BUILD):
	mkdir -p $(BUILD)

$(BUILD)/mft: tools/mft.c tools/bench.h tools/report.h $(HEADERS) | $(BUILD)
	$(CC) -std=c99 $(CFLAGS) $(WARN) -I. tools/mft.c -o $@ $(LIBS)

# Tests that look behind the public declarations hold the implementation, as an app's one file does; the others
# share an object of it, which is compiled once.
INSIDE  := $(patsubst tests/%.c,$(BUILD)/%,$(shell grep -l -e MFT_IMPLEMENTATION -e '"test_.*\.c"' tests/test_*.c))
OUTSIDE  = $(filter-out $(INSIDE),$(patsubst tests/%.c,$(BUILD)/%,$(wildcard tests/test_*.c)))

# Compiling is what takes the time, so that tests that compute little are compiled with less optimisation; with a
# sanitizer with none, and the debug information is lines alone.
LIGHT = bad_input chat checkpoint dataset json memory memory_trace optimizer safetensors tape tokenizer unicode
$(LIGHT:%=$(BUILD)/test_%): override CFLAGS := $(CFLAGS_LIGHT)

$(BUILD)/library.o: $(HEADERS) | $(BUILD)
	$(CC) -std=c99 $(CFLAGS) $(WARN) -DMFT_IMPLEMENTATION -I. -x c -c mft_models.h -o $@

$(BUILD)/test_kernels_amx $(BUILD)/test_kernels_app $(BUILD)/test_kernels_cblas: tests/test_kernels.c
$(BUILD)/test_golden_amx: tests/test_golden.c

$(INSIDE): $(BUILD)/test_%: tests/test_%.c $(wildcard tests/*.h) $(HEADERS) | $(BUILD)
	$(CC) -std=c99 $(CFLAGS) $(WARN) -I. -Itests $< -o $@ $(LIBS)

$(OUTSIDE): $(BUILD)/test_%: tests/test_%.c $(wildcard tests/*.h) $(BUILD)/library.o
	$(CC) -std=c99 $(CFLAGS) $(WARN) -I. -Itests $< $(BUILD)/library.o -o $@ $(LIBS)

$(BUILD)/test_%: tests/test_%.cc $(wildcard tests/*.h) $(HEADERS) | $(BUILD)
	$(CXX) -std=c++11 $(CFLAGS) -Wall -Wextra -Wpedantic -Wshadow -I. -Itests $< -o $@ $(LIBS)

$(BUILD)/%: examples/%.c $(HEADERS) | $(BUILD)
	$(CC) -std=c99 $(CFLAGS) $(WARN) -I. $< -o $@ $(LIBS)

$(BUILD)/%: examples/%.cc $(HEADERS) | $(BUILD)
	$(CXX) -std=c++11 $(CFLAGS) -Wall -Wextra -Wpedantic -Wshadow -I. $< -o $@ $(LIBS)

$(BUILD)/fuzz_%: tests/fuzz/fuzz_%.c tests/fuzz/fuzz.h $(HEADERS) | $(BUILD)
	$(CC) -std=c99 $(FUZZ_FLAGS) $(WARN) -I. -Itests/fuzz -Itests $< -o $@ $(LIBS)

# Runs all of them, sums what they report, fails if one failed. ALL: what else must build.
test: $(TESTS) $(TESTS_CXX) $(ALL)
	@RUN="$(RUN)" BUILD="$(BUILD)" sh tests/run.sh $(TESTS) $(TESTS_CXX)

demo: $(BUILD)/demo
	$(RUN) $(BUILD)/demo

bench: $(BUILD)/mft
	$(RUN) $(BUILD)/mft bench

bench-amx-pace: tools/mft.c tools/amx_pace.h tools/bench.h tools/report.h $(HEADERS) | $(BUILD)
	$(CC) -std=c99 $(CFLAGS) $(WARN) -I. -include tools/amx_pace.h tools/mft.c -o $(BUILD)/mft-amx-pace $(LIBS)
	$(RUN) $(BUILD)/mft-amx-pace bench kernels --kernels amx

bench-memory: $(BUILD)/mft
	@RUN="$(RUN)" BUILD="$(BUILD)" STEPS="$(STEPS)" MODELS="$(MODELS)" sh tools/bench_memory.sh

sanitize: sanitize-address sanitize-thread

sanitize-address:
	$(MAKE) test ALL=$(BUILD)/asan/mft BUILD=$(BUILD)/asan CFLAGS="-O1 $(SANITIZE)" CFLAGS_LIGHT="-O0 $(SANITIZE)"

sanitize-thread:
	$(MAKE) test ALL= BUILD=$(BUILD)/tsan CFLAGS="-O1 -g1 -fsanitize=thread" TESTS="$(BUILD)/tsan/test_threads $(BUILD)/tsan/test_tape $(BUILD)/tsan/test_models $(BUILD)/tsan/test_memory_trace"

fuzz: $(FUZZERS)
	@RUN="$(RUN)" FUZZ_SECONDS="$(FUZZ_SECONDS)" sh tests/fuzz/run.sh $(FUZZERS)

clean:
	rm -rf $(BUILD)

.PHONY: all test demo bench bench-amx-pace bench-memory sanitize sanitize-address sanitize-thread fuzz clean
