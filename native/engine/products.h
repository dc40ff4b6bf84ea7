// Products of rows of activations with linear layers: what one thread does of them.
#pragma once

#include <vector>

#include "kernels.h"
#include "pool.h"

namespace bitpress {

// How the columns of sixteen-bit weights are cut for products with 8-bit activations.
Cut flat_cut(int columns);
// out[row][16] += a strip of one factor of a low-rank term times rows of x, of its `width()`
void add_factor(const Kernels &kernels, const Factor &factor, int strip, const float *x, int rows, float *out);

// One output of a phase: rows [row * stride + output feature].
struct Product {
    const Linear *linear;
    float *out;
    int stride;
};

// What products of one input need of it: the rows themselves and, made once, their bytes or padded floats for every cut, and the
// inner vectors of low-rank terms.
class Input {
  public:
    // Makes room for `rows` rows and every form that these linears want. Called by one thread.
    void plan(const Kernels &kernels, const std::vector<const Linear *> &linears, int rows, bool bytes);
    // Fills every form of one row. Different threads may fill different rows.
    void prepare(const Kernels &kernels, const float *x, int row);

    struct Form {
        enum Kind { direct, tiled, halved, floats, mapped, inner } kind;
        Cut cut;
        const InputMap *map;   // that the row has been through, or null
        const Linear *linear;  // whose low-rank term it is, or null
        const int32_t *picked; // of the row's columns, or null for all
        Quantized quantized;
        Tiled tiles;
        HalfRows halves;
        Aligned<float> values;  // [row][width]
        int width;

        bool is(Kind k, const Cut &c, const InputMap *m, const Linear *l, const int32_t *p) const {
            return kind == k && cut == c && map == m && linear == l && picked == p;
        }
    };
    const Form &find(Form::Kind kind, const Cut &cut, const InputMap *map, const Linear *linear = nullptr, const int32_t *picked = nullptr) const;
    int rows() const { return rows_; }
    bool bytes() const { return bytes_; }
    // How products of many rows read a row: in bytes, or in bf16 where the processor has tiles for it.
    static Form::Kind many(const Kernels &kernels) { return kernels.half_product != nullptr ? Form::halved : Form::tiled; }
    // Values that stand apart, of all rows and forms.
    int64_t apart() const;
    int64_t values() const;

  private:
    void want(Form::Kind kind, const Cut &cut, const InputMap *map, const Linear *linear = nullptr, const int32_t *picked = nullptr);
    std::vector<Form> forms_;
    size_t used_ = 0;
    int rows_ = 0;
    bool bytes_ = true;
    std::vector<const Linear *> planned_;
};

// Memory of one thread for tiles and panels.
struct Scratch {
    Aligned<int8_t> tiles;
    Aligned<uint8_t> known;
    Aligned<uint16_t> halves;
    Aligned<float> scales, panel, single, out, attention;
    std::vector<float> queries;
};

// The gated half of an MLP, many rows: out = act(gate @ x) * (up @ x), a strip of both at a time.
struct Gated {
    const Linear *gate, *up;
    float *out;
    int stride;
    bool tanh_gelu;
};
void multiply_gated(const Kernels &kernels, Pool &pool, int thread, const Gated &product, const Input &input, Scratch &scratch);

// This thread's share of the products of `input`, handed out by the pool. The caller waits afterwards.
void multiply(const Kernels &kernels, Pool &pool, int thread, const std::vector<Product> &products, const Input &input,
              Scratch &scratch);

// The maps of the products' outputs, once all threads have multiplied; some rows for each of them. Waits where there are such maps.
void map_outputs(Pool &pool, int thread, const std::vector<Product> &products, int rows);

}  // namespace bitpress
