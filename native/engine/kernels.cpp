#include "kernels.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace bitpress {

const Kernels &choose_kernels(const char *name) {
    const Kernels *paths[] = {amx_kernels(), avx512_kernels(), avx2_kernels(), &portable_kernels()};
    std::string there;
    for (const Kernels *path : paths) {
        if (path == nullptr) continue;
        if (name == nullptr || *name == 0 || std::strcmp(name, path->name) == 0) return *path;
        there += there.empty() ? path->name : std::string(", ") + path->name;
    }
    if (std::strcmp(name, emulated_kernels().name) == 0) return emulated_kernels();
    throw std::invalid_argument("code path '" + std::string(name) + "' is not there; this processor runs " + there);
}

const CacheKind &choose_cache(const Kernels &kernels, const char *name) {
    std::string there;
    for (int i = 0; i < kernels.cache_kinds; ++i) {
        if (std::strcmp(name, kernels.caches[i].name) == 0) return kernels.caches[i];
        there += there.empty() ? kernels.caches[i].name : std::string(" or ") + kernels.caches[i].name;
    }
    throw std::invalid_argument("cache must be " + there + ", not '" + name + "'");
}

}  // namespace bitpress
