// cpp.cc - the headers in a C++ program, with owners that clean up
//
//     build/cpp examples/demo/base
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"

#include <cstdio>
#include <memory>
#include <vector>

struct EndContext { void operator()(mft_context *ctx) const { mft_context_destroy(ctx); } };

int main(int argc, char **argv)
{
    if (argc != 2) { std::fprintf(stderr, "usage: cpp MODEL_DIR\n"); return 2; }
    mft_context *made = nullptr;
    if (mft_context_create(nullptr, &made) != MFT_OK) return 1;
    std::unique_ptr<mft_context, EndContext> ctx(made);         // everything below ends with it

    mft_model_config config;
    if (mft_model_inspect(ctx.get(), argv[1], &config) != MFT_OK) {
        std::fprintf(stderr, "%s\n", mft_error_message(ctx.get()));
        return 1;
    }
    std::printf("%s: %lld parameters in %d layers\n", mft_family_name(config.family), (long long)config.n_params, config.n_layer);

    mft_tokenizer *tok = nullptr;
    if (mft_tokenizer_load(ctx.get(), argv[1], &tok) != MFT_OK) {
        std::fprintf(stderr, "%s\n", mft_error_message(ctx.get()));
        return 1;
    }
    std::vector<int32_t> ids(64);
    int64_t n = mft_tokenizer_encode(tok, "How are you today?", -1, 0, ids.data(), (int64_t)ids.size());
    for (int64_t i = 0; i < n; i++) std::printf("%ld ", (long)ids[(size_t)i]);
    std::printf("\n");
    return 0;
}
